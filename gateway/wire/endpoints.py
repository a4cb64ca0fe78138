"""The wire formats by endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gateway.wire import Wire
from gateway.wire.chat import ChatWire
from gateway.wire.completions import CompletionsWire
from gateway.wire.embeddings import EmbeddingsWire
from gateway.wire.responses import ResponsesWire

_ALL: tuple[Wire, ...] = (ChatWire(), CompletionsWire(), EmbeddingsWire(), ResponsesWire())

WIRES: Mapping[str, Wire] = MappingProxyType({wire.endpoint: wire for wire in _ALL})
"""By `Document.endpoint`."""
