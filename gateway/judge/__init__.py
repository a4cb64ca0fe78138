"""The judge at work: the learned pair model, beside the guards of `policies`."""


class JudgeError(Exception):
    """The pair model cannot be used; the message names the file and what is wrong with it."""
