"""Categories: which rules hold for a call, and how its category is found.

Rules differ by category because the traffic does (arXiv 2510.26835): code and documentation repeat and keep for weeks,
prices go stale in minutes, a wrong medical answer costs more than a missed hit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from policies.controls import Controls, Mode
from policies.examples import ExampleRules
from policies.freshness import FreshnessRules
from policies.personal import Handling

FALLBACK = "general"


@dataclass(frozen=True, slots=True)
class CategoryPolicy:
    """The rules inside a scope for one category."""

    name: str
    mode: Mode = Mode.SEMANTIC
    threshold: float = 0.90
    """Cosine from which a neighbour is accepted; a request may raise it, never lower it."""
    ttl: float = 86400.0
    """Seconds."""
    quota_min: float = 0.0
    """Share of the cache that other categories cannot take."""
    quota_max: float = 1.0
    """Share that may be exceeded only while the budget is free."""
    error_budget: float = 0.01
    """Accepted probability of a wrong answer among semantic hits."""
    max_relax: float = 0.0
    """How far the threshold may fall under load."""
    ttl_jitter: float = 0.02
    """Share by which a TTL may be shortened at random, so that what came together does not expire together."""
    freshness: FreshnessRules = field(default_factory=FreshnessRules)
    stale_while_revalidate: float = 0.0
    """Seconds after its expiry in which an answer is served at once while it is fetched anew."""
    stale_if_error: float = 0.0
    """Seconds after its expiry in which an answer is served if the backend fails."""
    admit_after: int = 1
    """Misses after which an answer is kept; 1 keeps the first."""
    replay_pace: float = 0.0
    """Tokens per second at which a stored answer is replayed as a stream; 0: as fast as the client reads."""
    personal: Handling = Handling.PRIVATE
    """What becomes of answers in which personal data is found."""
    example: ExampleRules | None = None
    """Whether a near answer may serve as an example to a cheaper model; None: never."""

    def under(self, controls: Controls) -> CategoryPolicy:
        """Return the rules for one call: a client may be stricter than the operator, never laxer."""
        if controls.mode is None and controls.threshold is None and controls.ttl is None:
            return self
        return replace(
            self,
            mode=self.mode if controls.mode is None else self.mode.stricter(controls.mode),
            threshold=self.threshold if controls.threshold is None else max(self.threshold, controls.threshold),
            ttl=self.ttl if controls.ttl is None else controls.ttl,
        )


PAIR_THRESHOLD = 0.55
"""Default threshold where the pair model judges: similarity only proposes."""
_CAUTION: Mapping[str, Mapping[str, Any]] = {
    "assistant": {"ttl": 3600.0},
    "code": {"threshold": 0.92},
    "conversation": {"threshold": 0.92},
    "finance": {"threshold": 0.95, "ttl": 3600.0},
    "general": {},
    "math": {"mode": Mode.EXACT},
    "medical": {"threshold": 0.95},
    "support": {"threshold": 0.92},
    "travel": {"threshold": 0.92, "ttl": 3600.0},
}
"""Built-in caution for the classifier's categories. It only ever makes the default stricter. Mathematics is exact:
a cosine does not see a changed number (GSM-Plus negatives look more alike than its positives)."""
_JUDGED = ("mode", "threshold")
"""Caution that is for cosines only: the pair model and its guards do see it."""


class UnknownCategoryError(ValueError):
    """A request names a category that the settings do not have."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Names a category for calls in which every given condition holds; texts are compared without case."""

    category: str
    system_contains: str | None = None
    user_contains: str | None = None
    model: str | None = None
    endpoint: str | None = None
    namespace: str | None = None

    def matches(self, facts: CallFacts) -> bool:
        """Say whether all conditions that are set hold."""
        return (
            (self.system_contains is None or self.system_contains.lower() in facts.system.lower())
            and (self.user_contains is None or self.user_contains.lower() in facts.user.lower())
            and (self.model is None or self.model == facts.model)
            and (self.endpoint is None or self.endpoint == facts.endpoint)
            and (self.namespace is None or self.namespace == facts.namespace)
        )


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What rules may look at."""

    endpoint: str
    model: str
    namespace: str
    system: str
    user: str


class CategoryTable:
    """All categories of a gateway and the rules that name them."""

    def __init__(
        self,
        default: CategoryPolicy,
        overrides: Mapping[str, Mapping[str, Any]],
        rules: Sequence[Rule] = (),
        *,
        judged: bool = False,
    ) -> None:
        """Build the table: default, made stricter by the built-in caution, overridden by the operator's settings.

        `judged` says that more than similarity decides.
        """
        self._rules = tuple(rules)
        names = sorted({*_CAUTION, *overrides})
        left_out = _JUDGED if judged else ()
        caution = {
            name: {key: value for key, value in _CAUTION.get(name, {}).items() if key not in left_out} for name in names
        }
        cautious = {name: _stricter(replace(default, name=name), caution[name]) for name in names}
        self._policies = {name: replace(cautious[name], **overrides.get(name, {})) for name in names}

    @property
    def policies(self) -> Mapping[str, CategoryPolicy]:
        """The rules by category name."""
        return self._policies

    @property
    def compares(self) -> bool:
        """Whether any category is compared by meaning at all."""
        return any(policy.mode is Mode.SEMANTIC for policy in self._policies.values())

    def named(self, name: str) -> CategoryPolicy:
        """Return the rules of a category; raises UnknownCategoryError with the known names."""
        try:
            return self._policies[name]
        except KeyError:
            known = ", ".join(self._policies)
            raise UnknownCategoryError(f"{name!r} is not a category; known are {known}") from None

    def fallback(self) -> CategoryPolicy:
        """Return the rules for calls that nothing classifies."""
        return self._policies[FALLBACK]

    def learned(self, name: str) -> CategoryPolicy:
        """Return the rules for a category that the classifier named."""
        return self._policies.get(name) or self.fallback()

    def decided(self, controls: Controls, facts: Callable[[], CallFacts]) -> CategoryPolicy | None:
        """Return the category that the header or the first matching rule names; None leaves it to the classifier.

        `facts` is only called when there are rules to ask. Raises UnknownCategoryError.
        """
        if controls.category is not None:
            return self.named(controls.category)
        if not self._rules:
            return None
        known = facts()
        return next((self._policies[rule.category] for rule in self._rules if rule.matches(known)), None)


def _stricter(policy: CategoryPolicy, caution: Mapping[str, Any]) -> CategoryPolicy:
    return replace(
        policy,
        mode=policy.mode.stricter(caution.get("mode", policy.mode)),
        threshold=max(policy.threshold, caution.get("threshold", 0.0)),
        ttl=min(policy.ttl, caution.get("ttl", policy.ttl)),
    )
