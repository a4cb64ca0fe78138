"""Every reason why a call was not answered from the cache, or its answer not stored.

Each member is a metric label, a value of `Cache-Status`'s `detail` and a line in docs/operations.md.
"""

from __future__ import annotations

from enum import StrEnum


class Miss(StrEnum):
    """Why the cache did not answer."""

    ABSENT = "absent"
    STALE = "stale"
    TOO_OLD = "too-old"
    REFRESH = "refresh"
    BELOW_THRESHOLD = "below-threshold"
    NO_NEIGHBOUR = "no-neighbour"
    JUDGE_REFUSED = "judge-refused"
    JUDGE_BUSY = "judge-busy"
    BELOW_POINT = "below-point"
    BUDGET_LEARNING = "budget-learning"
    BUDGET_EXHAUSTED = "budget-exhausted"
    REFUTED = "refuted"
    NOT_WORTH_IT = "not-worth-it"
    TEXT_TOO_LONG = "text-too-long"
    LEANS_ON_CONTEXT = "leans-on-context"
    AGENT_STEP = "agent-step"
    VOLATILE = "volatile"
    EXAMPLE = "example"
    LOADING = "loading"
    EMBEDDER_FAILED = "embedder-failed"
    STORE_FAILED = "store-failed"


class Bypass(StrEnum):
    """Why the cache was neither asked nor told."""

    MODE_OFF = "mode-off"
    NO_STORE = "no-store"
    STATEFUL = "stateful"


class NotStored(StrEnum):
    """Why an answer was not kept."""

    ERROR_STATUS = "error-status"
    TRUNCATED = "truncated"
    FILTERED = "filtered"
    BROKEN_STREAM = "broken-stream"
    EMPTY = "empty"
    MALFORMED = "malformed"
    FORBIDDEN = "forbidden-by-request"
    EXPIRED_AT_ONCE = "zero-ttl"
    VOLATILE = "volatile"
    TOO_SELDOM = "too-seldom"
    PERSONAL = "personal-data"
    TOO_LARGE = "too-large"
    OVER_QUOTA = "over-quota"
    DISK_FULL = "disk-full"
    STORE_FAILED = "store-failed"
    STORE_BUSY = "store-busy"


class Check(StrEnum):
    """What came of comparing a stored answer with the backend's."""

    RIGHT = "right"
    WRONG = "wrong"
    UNCLEAR = "unclear"
    FAILED = "failed"
    NOT_COMPARABLE = "not-comparable"
    CROWDED_OUT = "crowded-out"


class Complaint(StrEnum):
    """How a client said that a hit was wrong."""

    FEEDBACK = "feedback"
    REFRESH = "refresh"
