"""What can go wrong before and during generation; the server maps the second kind to HTTP in one place."""

from __future__ import annotations


class CheckpointError(Exception):
    """A model directory cannot be loaded; the message names the file or field."""


class SettingsError(Exception):
    """A flag cannot be followed; the message names it."""


class RequestError(Exception):
    """A request that is refused, in the shape that OpenAI's clients understand."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ContextTooLong(RequestError):
    """Prompt (or prompt and answer) do not fit the model's context."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFound(RequestError):
    """Another model was asked for than the one this engine serves."""

    status = 404

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(
            f"The model {asked!r} does not exist here; this engine serves {served!r}.",
            param="model",
            code="model_not_found",
        )


class QueueFull(RequestError):
    """As many requests as may wait are waiting already."""

    status = 429

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} requests are waiting already; try again later.", code="queue_full")


class ShuttingDown(RequestError):
    """The engine is stopping and takes nothing more."""

    status = 503

    def __init__(self) -> None:
        super().__init__("The engine is shutting down.", code="shutting_down")
