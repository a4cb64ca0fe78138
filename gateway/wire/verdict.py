"""Judging whether an answer of chat or completions is whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from gateway.wire import Verdict
from policies.reasons import NotStored

# A closed list: what a backend invents tomorrow is not kept before somebody has looked at it.
_WHOLE = frozenset(
    {"stop", "tool_calls", "function_call", "complete", "end_turn", "eos", "eos_token", "stop_sequence", "tool_use"}
)
_TRUNCATED = frozenset({"length", "max_tokens", "model_length", "max_output_tokens"})
_FILTERED = frozenset({"content_filter", "safety"})

Fault = Callable[[dict[str, Any]], NotStored | None]
"""What is wrong with one choice whose finish is in order."""


def inspect_choices(answer: Any, fault: Fault) -> Verdict:
    """Judge every choice; one bad choice makes the answer bad."""
    return counted(answer, _refusal(answer, fault), "prompt_tokens", "completion_tokens")


def counted(answer: Any, refusal: NotStored | None, prompt: str, completion: str) -> Verdict:
    """Give the verdict with the answer's token counts, 0 where it does not tell them."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return Verdict(refusal)
    return Verdict(refusal, _count(usage.get(prompt)), _count(usage.get(completion)))


def unwritable(answer: Any) -> NotStored | None:
    """Refuse an answer that a replay could not write: JSON may be read from deeper nesting than it is written with.

    One level is kept for the events of a replay.
    """
    try:
        orjson.dumps([answer])
    except TypeError:
        return NotStored.MALFORMED
    return None


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _refusal(answer: Any, fault: Fault) -> NotStored | None:
    if not isinstance(answer, dict):
        return NotStored.MALFORMED
    if answer.get("error"):
        return NotStored.ERROR_STATUS
    choices = answer.get("choices")
    if not isinstance(choices, list):
        return NotStored.MALFORMED
    if not choices:
        return NotStored.EMPTY
    faults = (_choice_fault(choice, fault) for choice in choices)
    return next((found for found in faults if found is not None), None) or unwritable(answer)


def _choice_fault(choice: Any, fault: Fault) -> NotStored | None:
    if not isinstance(choice, dict) or not isinstance(choice.get("finish_reason"), str):
        return NotStored.MALFORMED
    reason = choice["finish_reason"].lower()
    if reason in _TRUNCATED:
        return NotStored.TRUNCATED
    if reason in _FILTERED:
        return NotStored.FILTERED
    if reason not in _WHOLE:
        return NotStored.MALFORMED
    return fault(choice)
