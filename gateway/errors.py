"""Every error that the gateway itself gives, and the one place that maps it to HTTP.

A backend's own error is not one of these: it passes through unchanged.
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson


class CannotListenError(Exception):
    """The address cannot be bound: the gateway does not start."""


class ApiError(Exception):
    """An error in OpenAI's shape; the subclass fixes status, type and code."""

    status: ClassVar[int]
    type: ClassVar[str]
    code: ClassVar[str]

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def document(self) -> dict[str, Any]:
        """Return the error object without its envelope."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        """Return the JSON body."""
        return orjson.dumps({"error": self.document()})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that go with it."""
        headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(self.retry_after + 0.5))).encode()))
        return headers


class BadRequestError(ApiError):
    """The request cannot be read; `param` names the field or header."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class AuthenticationError(ApiError):
    """The key is missing or wrong."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class UnknownModelError(ApiError):
    """No upstream serves the model."""

    status, type, code = 404, "invalid_request_error", "model_not_found"


class UnknownPathError(ApiError):
    """There is nothing at this path."""

    status, type, code = 404, "invalid_request_error", "unknown_url"


class UnknownEntryError(ApiError):
    """The caller has no such entry."""

    status, type, code = 404, "invalid_request_error", "entry_not_found"


class MethodError(ApiError):
    """The path exists, but not for this method."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class TooLargeError(ApiError):
    """The request body is over the limit."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class RateLimitError(ApiError):
    """The tenant is over its rate."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class InternalError(ApiError):
    """A fault of the gateway; the log has the trace."""

    status, type, code = 500, "api_error", "internal_error"


class BackendUnreachableError(ApiError):
    """No backend could be connected to."""

    status, type, code = 502, "backend_error", "backend_unreachable"


class NotReadyError(BackendUnreachableError):
    """The bundled engine is being started again."""

    status, type, code = 503, "backend_error", "backend_not_ready"


class BackendBrokenError(ApiError):
    """The backend broke off, or what it sent cannot be read."""

    status, type, code = 502, "backend_error", "backend_broken"


class BackendTimeoutError(ApiError):
    """The backend kept the gateway waiting for too long."""

    status, type, code = 504, "backend_error", "backend_timeout"


class NotCachedError(ApiError):
    """The request said only-if-cached, and there is no fresh answer (RFC 9111 §5.2.1.7)."""

    status, type, code = 504, "cache_error", "not_cached"
