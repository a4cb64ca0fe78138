"""The store under random operations against a dictionary."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachestore import Document, Filter
from tests.cachestore.samples import ManualClock, digest, document, open_store, vector

T = TypeVar("T")
NAMES = st.integers(0, 11)
SCOPES = st.sampled_from(["one", "two", ""])
CATEGORIES = st.sampled_from(["code", "chat"])


class StoreAgainstDict(RuleBasedStateMachine):
    """Ids are compared too: the model remembers which one each name was given."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.clock = ManualClock()
        self.model: dict[int, tuple[int, Document]] = {}
        self.version = 0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def alive(self, grace: float = 0.0) -> dict[int, tuple[int, Document]]:
        return {name: kept for name, kept in self.model.items() if kept[1].expires + grace > self.clock.now}

    @initialize()
    def open(self) -> None:
        self.store = self.do(open_store(self.directory, self.clock))

    @rule(name=NAMES, scope=SCOPES, category=CATEGORIES, lifetime=st.integers(1, 100))
    def put(self, name: int, scope: str, category: str, lifetime: int) -> None:
        wanted = self.make(name, scope, category, lifetime)
        outcome = self.do(self.store.put(wanted))
        assert isinstance(outcome, int)
        self.model[name] = outcome, wanted

    def make(self, name: int, scope: str, category: str, lifetime: int) -> Document:
        self.version += 1
        return document(
            name,
            scope=digest(scope) if scope else b"",
            category=category,
            body=b"%d " % self.version * 50,
            vector=vector(name),
            created=self.clock.now,
            expires=self.clock.now + lifetime,
        )

    @rule(names=st.lists(NAMES, max_size=6), scope=SCOPES)
    def put_many(self, names: list[int], scope: str) -> None:
        wanted = [self.make(name, scope, "code", 60) for name in names]

        async def together() -> list[Any]:
            return await asyncio.gather(*(self.store.put(one) for one in wanted))

        for name, one, outcome in zip(names, wanted, self.do(together()), strict=True):
            self.model[name] = outcome, one

    @rule(name=NAMES, grace=st.sampled_from([0, 30]))
    def get(self, name: int, grace: float) -> None:
        hit = self.do(self.store.get(digest(name), grace=grace))
        kept = self.alive(grace).get(name)
        if kept is None:
            assert hit is None
        else:
            assert hit is not None
            assert (hit.id, hit.body) == (kept[0], kept[1].body)

    @rule(name=NAMES)
    def fetch(self, name: int) -> None:
        if name not in self.model:
            return
        id_, wanted = self.model[name]
        hit = self.do(self.store.fetch(id_))
        assert (hit is not None and hit.body == wanted.body) == (name in self.alive())

    @rule(name=NAMES, scope=st.sampled_from(["one", "two"]), k=st.integers(1, 12))
    def search(self, name: int, scope: str, k: int) -> None:
        found = self.store.search(digest(scope), vector(name), k, -1.0)
        alive = [(id_, one) for id_, one in self.alive().values() if one.scope == digest(scope)]
        cosines = {id_: float(one.vector @ vector(name)) for id_, one in alive if one.vector is not None}
        assert [n.id for n in found] == sorted(cosines, key=lambda id_: -cosines[id_])[:k]

    @rule(category=CATEGORIES, dry_run=st.booleans())
    def purge(self, category: str, dry_run: bool) -> None:
        purged = self.do(self.store.purge(Filter(category=category), dry_run=dry_run))
        matching = {name: kept for name, kept in self.model.items() if kept[1].category == category}
        # What is beyond its grace may have been swept or not.
        assert {kept[0] for name, kept in self.alive(grace=100).items() if name in matching} <= set(purged)
        assert set(purged) <= {kept[0] for kept in matching.values()}
        if not dry_run:
            for name in matching:
                del self.model[name]

    @rule(seconds=st.sampled_from([5, 50, 300]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def sweep(self) -> None:
        self.do(self.store.sweep())
        self.model = self.alive(grace=100)

    @rule()
    def reopen(self) -> None:
        self.do(self.store.close())
        self.open()

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def check(self) -> None:
        assert self.do(self.store.check()) == []
        for name in range(12):
            kept = self.alive().get(name)
            hit = self.store.hot(digest(name))
            assert hit is None or (kept is not None and hit.body == kept[1].body)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.do(self.store.close())
        self.runner.close()
        shutil.rmtree(self.directory)


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=25, stateful_step_count=30)
