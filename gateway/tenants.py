"""Who asks: the tenant of a call, its namespace in the cache, its rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from gateway.errors import AuthenticationError, RateLimitError
from gateway.settings import SHARED, Tenant, secret
from policies.ratelimit import TokenBucket


@dataclass(frozen=True, slots=True)
class Caller:
    """A client, as far as the cache is concerned."""

    namespace: str
    bucket: TokenBucket | None = None
    shared: str | None = None
    """The namespace that it shares with others; None: none."""


class Tenants:
    """Finds the caller of a request by its key.

    With tenants configured, their keys are the only ones that open the gateway. Without, any client's own token goes to
    the backend, and its hash is the client's namespace, so that two clients with different tokens never share answers.
    """

    def __init__(self, tenants: Sequence[Tenant], *, shared: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the tenants' keys from the environment. Raises SettingsError naming an unset variable."""
        self._shared = SHARED if shared else None
        self._anonymous = Caller("anonymous", shared=self._shared)
        self._clock = clock
        self._by_key = {
            _fingerprint(secret(tenant.key_env, key=f"tenants.{tenant.name}.key_env") or ""): Caller(
                tenant.name,
                None if tenant.rate_limit is None else TokenBucket(tenant.rate_limit),
                self._shared,
            )
            for tenant in tenants
        }

    def identify(self, credential: str) -> Caller:
        """Return the caller that the credential names. Raises AuthenticationError, RateLimitError."""
        if self._by_key:
            return self._known(credential)
        return Caller(f"token-{_fingerprint(credential)}", shared=self._shared) if credential else self._anonymous

    def _known(self, credential: str) -> Caller:
        caller = self._by_key.get(_fingerprint(credential))
        if caller is None:
            raise AuthenticationError("this gateway needs the key of one of its tenants as bearer token")
        wait = caller.bucket.take(self._clock()) if caller.bucket is not None else 0.0
        if wait > 0:
            raise RateLimitError("the tenant is over its rate limit", retry_after=wait)
        return caller


def credential(headers: dict[str, str]) -> str:
    """Return the client's key from `Authorization: Bearer`, `api-key` or `x-api-key`; empty when there is none."""
    authorization = headers.get("authorization", "")
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return authorization or headers.get("api-key") or headers.get("x-api-key") or ""


def _fingerprint(key: str) -> str:
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
