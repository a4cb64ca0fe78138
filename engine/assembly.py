"""The engine put together from its settings: everything that can be wrong is found here, before anything listens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from starlette.applications import Starlette

from cachestore.kv import Geometry, Happening, KvStore, Options, StoreError, Tiers, open_store
from engine.attention import AttentionBackend
from engine.attention.choose import choose, choose_ops
from engine.attention.varlen import Unavailable
from engine.blocks import BlockManager
from engine.checkpoint import BUNDLED, Checkpoint, load_checkpoint
from engine.cpu import lay_out
from engine.errors import SettingsError
from engine.events import EventsError, EventSettings, Publisher
from engine.executor import BLOCK_SIZE, Executor, block_bytes
from engine.graphs import CAPTURABLE
from engine.metrics import EngineMetrics, EngineState
from engine.reuse.cutting import Cutter
from engine.reuse.finding import Marks
from engine.reuse.library import Library
from engine.reuse.point import OperatingPoint, PointError, beside, load
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.server import Delivery, Engine
from engine.settings import ReuseSettings, Settings

_KV_MEMORY = 2**30
"""Bytes for keys and values on a CPU; the pages are only taken from the system when they are first written."""
_KV_SHARE = 0.85
"""Share of a GPU's free memory for them; the rest is for what a step computes."""
_HOT = 2**28
_TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}
"""Large enough to keep the cores busy, small enough that a prompt's piece does not hold up those who read along."""


log = logging.getLogger("hitpath.engine")


@dataclass(frozen=True, slots=True)
class Assembled:
    """An engine ready to serve."""

    application: Starlette
    checkpoint: Checkpoint
    context: int
    blocks: int
    attention: str
    threads: int
    publisher: Publisher | None
    library: Library | None
    tiers: tuple[str, ...]
    """Where chunks are kept, from fast to slow."""

    def describe(self) -> str:
        """The facts of the ready line."""
        checkpoint = self.checkpoint
        return (
            f"model={checkpoint.name} device={checkpoint.device} dtype={str(checkpoint.dtype).removeprefix('torch.')} "
            f"context={self.context} kv_tokens={self.blocks * BLOCK_SIZE} attention={self.attention} "
            f"threads={self.threads} reuse={self._reuse()} kv_tiers={','.join(self.tiers) or 'none'}"
        )

    def _reuse(self) -> str:
        point = None if self.library is None else self.library.point
        return "off" if point is None else f"{point.selector}@{point.ratio:g}"

    def close(self) -> None:
        """Let go of chunks, stop publishing; the worker has ended with the application."""
        if self.library is not None:
            self.library.close()
        if self.publisher is not None:
            self.publisher.close()


def assemble(settings: Settings) -> Assembled:
    """Load, allocate, connect. Raises CheckpointError and SettingsError naming the file, field or flag."""
    # Threads that this one starts stay, and with more threads than cores none of them spins (`engine.threads`).
    torch.set_num_threads(1)
    directory = BUNDLED if settings.model == "bundled" else Path(settings.model)
    device = _device(settings.device, cuda=torch.cuda.is_available())
    checkpoint = load_checkpoint(directory, name=settings.served_name, device=device, dtype=settings.dtype)
    speed_up(checkpoint)
    blocks = _blocks(checkpoint, settings.kv_memory)
    context = _context(checkpoint, blocks * BLOCK_SIZE, settings.context)
    point = operating_point(settings, checkpoint, directory)
    parts = _parts(settings, checkpoint, blocks, context, repairs=0 if point is None else point.repair)
    library, tiers = (None, ()) if point is None else _library(settings, parts, point)
    application = _application(parts, library, context, settings.reuse)
    if parts.publisher is not None:
        parts.publisher.start()
    return Assembled(
        application, checkpoint, context, blocks, parts.backend.name, settings.threads, parts.publisher, library, tiers
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    checkpoint: Checkpoint
    blocks: int
    backend: AttentionBackend
    executor: Executor
    books: BlockManager
    scheduler: Scheduler
    publisher: Publisher | None


def _parts(settings: Settings, checkpoint: Checkpoint, blocks: int, context: int, *, repairs: int) -> _Parts:
    """All but chunk reuse. Raises SettingsError."""
    try:
        backend = choose(
            checkpoint.config,
            dtype=checkpoint.dtype,
            device=checkpoint.device,
            block_size=BLOCK_SIZE,
            wanted=settings.attention,
        )
        executor = Executor(checkpoint, backend, blocks=blocks, context=context, threads=settings.threads)
        if checkpoint.device.type == "cuda" and backend.name in CAPTURABLE:
            executor.capture(settings.max_running)
        publisher = _publisher(settings)
    except (Unavailable, EventsError) as error:
        raise SettingsError(str(error)) from error
    except (RuntimeError, MemoryError) as error:  # also CUDA's own out of memory
        raise SettingsError(f"--kv-memory: {blocks * block_bytes(checkpoint)} bytes cannot be had: {error}") from error
    books = BlockManager(blocks, BLOCK_SIZE, root=_root(checkpoint), sink=None if publisher is None else publisher.put)
    scheduler = Scheduler(
        books,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        token_budget=settings.token_budget or max(_TOKEN_BUDGET[checkpoint.device.type], settings.max_running),
        patience=settings.patience,
        repairs=repairs,
    )
    return _Parts(checkpoint, blocks, backend, executor, books, scheduler, publisher)


def _application(parts: _Parts, library: Library | None, context: int, reuse: ReuseSettings) -> Starlette:
    checkpoint, books, publisher, scheduler = parts.checkpoint, parts.books, parts.publisher, parts.scheduler

    def state() -> EngineState:
        running, waiting = runner.depth()
        return EngineState(
            running=running,
            waiting=waiting,
            preemptions=scheduler.preemptions,
            repaired=scheduler.repaired,
            free=books.free(),
            cached=books.cached(),
            used=books.used(),
            block_size=books.size,
            sheds=runner.sheds,
            check_failures=runner.check_failures,
            events_published=0 if publisher is None else publisher.published,
            events_dropped=0 if publisher is None else publisher.dropped,
            reuse=None if library is None else library.figures(),
        )

    delivery = Delivery()
    metrics = EngineMetrics(checkpoint.name, state, context=context)
    runner = Runner(checkpoint, scheduler, parts.executor, deliver=delivery, watch=metrics, library=library)
    cutter = None
    if library is not None:
        library.open(runner.wake)
        cutter = Cutter(checkpoint.tokenizer, Marks(reuse.tags, reuse.separators), library.point.least)
    engine = Engine(checkpoint, runner, context=context, delivery=delivery, metrics=metrics, cutter=cutter)
    return engine.application()


def operating_point(settings: Settings, checkpoint: Checkpoint, directory: Path) -> OperatingPoint | None:
    """How chunks are reused; None, and a line in the log that says why: not at all.

    Raises PointError for a file that was named and cannot be used, and for one beside the model that is broken.
    """
    if not settings.reuse.on:
        return None
    named = settings.reuse.point
    path = beside(directory, checkpoint.dtype) if named is None else named
    if named is None and not path.is_file():
        log.warning(
            "every token is computed: no operating point for reusing text (%s); `hitpath engine calibrate --model %s` "
            "measures one",
            path,
            settings.model,
        )
        return None
    point = load(path)
    try:
        point.check_model(checkpoint.fingerprint, checkpoint.dtype, str(path))
    except PointError as error:
        if named is not None:
            raise
        # The same files on another machine may well compute in another dtype: no reason not to start.
        log.warning("every token is computed: %s", error)
        return None
    return point


def _library(settings: Settings, parts: _Parts, point: OperatingPoint) -> tuple[Library, tuple[str, ...]]:
    """The library and its tiers. Raises SettingsError where a tier cannot be had."""
    checkpoint, books, publisher = parts.checkpoint, parts.books, parts.publisher
    config, reuse = checkpoint.config, settings.reuse
    geometry = Geometry(checkpoint.fingerprint, config.layers, config.kv_heads, config.head_dim, checkpoint.dtype)
    # What bounds the slower tiers bounds the books; memory gives up copies of what lies there by itself.
    slower = reuse.disk is not None or reuse.redis is not None
    capacity = reuse.disk_size if slower else reuse.host
    options = Options(capacity=capacity, quota=reuse.quota, codec=point.codec)
    tiers = ["pool", "memory"]

    def opened(observe: Callable[[Happening], None]) -> KvStore:
        try:
            store = open_store(geometry, Tiers(reuse.host, reuse.disk, reuse.redis), options, observe=observe)
        except (StoreError, OSError) as error:
            raise SettingsError(f"--kv-disk {reuse.disk}: {error}") from error
        if store.note is not None:
            log.warning(store.note)
        else:
            tiers.extend(name for name, place in (("disk", reuse.disk), ("redis", reuse.redis)) if place is not None)
        return store.store

    library = Library(
        checkpoint,
        parts.backend,
        point,
        open_store=opened,
        hot=hot_bytes(parts.blocks * block_bytes(checkpoint)),
        known=books.lookup,
        tell=None if publisher is None else publisher.put,
        patience=options.patience,
    )
    return library, tuple(tiers)


def hot_bytes(pool: int) -> int:
    """Bytes of decoded chunks kept on the device beside a pool of so many."""
    return min(pool // 4, max(_HOT, pool // 16))


def speed_up(checkpoint: Checkpoint) -> None:
    """Let the model compute the way its device likes best, where that proves itself."""
    model = checkpoint.model
    if checkpoint.device.type == "cpu":
        lay_out(model)
    model.ops = choose_ops(checkpoint.config, dtype=checkpoint.dtype, device=checkpoint.device, products=model.ops)


def _device(asked: str, *, cuda: bool) -> str:
    if asked == "cuda" and not cuda:
        raise SettingsError("--device cuda: no CUDA device is usable here")
    return ("cuda" if cuda else "cpu") if asked == "auto" else asked


def _blocks(checkpoint: Checkpoint, kv_memory: int | None) -> int:
    """Blocks that the budget holds."""
    each = block_bytes(checkpoint)
    if kv_memory is None and checkpoint.device.type == "cuda":
        kv_memory = int(torch.cuda.mem_get_info(checkpoint.device)[0] * _KV_SHARE)
    budget = _KV_MEMORY if kv_memory is None else kv_memory
    if budget < each:
        raise SettingsError(f"--kv-memory: {budget} bytes do not hold one block of this model, which has {each}")
    return budget // each


def _context(checkpoint: Checkpoint, room: int, asked: int | None) -> int:
    """Most tokens of prompt and answer together: what was asked for, else what model and memory allow."""
    longest = checkpoint.config.context
    if asked is None:
        return min(longest, room)
    if asked > longest:
        raise SettingsError(f"--context: {asked} tokens are more than the model's {longest}")
    if asked > room:
        needed = -(-asked // BLOCK_SIZE) * block_bytes(checkpoint)
        raise SettingsError(f"--context: {asked} tokens need --kv-memory of {needed} bytes or more; {room} fit")
    if asked < 2:
        raise SettingsError("--context: a prompt and an answer need two tokens at least")
    return asked


def _publisher(settings: Settings) -> Publisher | None:
    if settings.kv_events is None:
        return None
    return Publisher(EventSettings(settings.kv_events, settings.kv_events_replay, settings.kv_events_topic))


def _root(checkpoint: Checkpoint) -> bytes:
    """What keys and values depend on besides tokens and tenant."""
    return hashlib.blake2b(f"{checkpoint.fingerprint}|{checkpoint.dtype}".encode(), digest_size=16).digest()
