"""`hitpath cache explain`, and the table of what was learnt that `hitpath cache stats` shows."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from cachestore.errors import StoreError
from gateway.settings import SettingsError

_TIMEOUT = 60.0
_PATHS = {"chat": "chat/completions", "responses": "responses"}
_HEADS = (
    "category",
    "budget",
    "standing",
    "point",
    "hits",
    "checked",
    "wrong",
    "saved up",
    "hit rate",
    "breaks even",
    "stage",
)


def run(options: argparse.Namespace) -> int:
    """Ask a running gateway and print what it says."""
    explained = _ask(options)
    print(json.dumps(explained, indent=2, ensure_ascii=False) if options.json else text(explained))
    return 0


def _body(options: argparse.Namespace) -> dict[str, Any]:
    if options.text == "-":
        try:
            body = json.load(sys.stdin)
        except ValueError as error:
            raise SettingsError(f"explain: standard input is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise SettingsError("explain: standard input is not a JSON object")
        return body
    turns = [{"role": "system", "content": options.system}] if options.system else []
    turns.append({"role": "user", "content": options.text})
    return {"model": options.model, ("messages" if options.endpoint == "chat" else "input"): turns}


def _ask(options: argparse.Namespace) -> dict[str, Any]:
    url = options.url.rstrip("/").removesuffix("/v1")
    key = options.key or os.environ.get("HITPATH_KEY")
    named = {"x-hitpath-category": options.category, "x-hitpath-namespace": options.namespace}
    named["authorization"] = f"Bearer {key}" if key else None
    headers = {"content-type": "application/json", "x-hitpath-mode": "explain"}
    headers |= {name: value for name, value in named.items() if value}
    data = json.dumps(_body(options)).encode()
    request = urllib.request.Request(f"{url}/v1/{_PATHS[options.endpoint]}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise StoreError(f"{url} answered {error.code}: {error.read()[:300].decode(errors='replace')}") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{url} cannot be asked: {error}") from error


def text(explained: Mapping[str, Any]) -> str:
    """For people."""
    outcome, category, scope = explained["outcome"], explained["category"], explained["scope"]
    reason = f" ({outcome['reason']})" if outcome["reason"] else ""
    entry = f", entry {outcome['entry']}" if outcome["entry"] else ""
    sure = "" if category["probability"] is None else f", {category['probability']:.2f} sure"
    lines = [
        f"would: {outcome['would']}{reason}{entry}",
        f"category: {category['name']} (by {category['why']}{sure})",
        f"exact key: {explained['exact']['key']}: {_exact(explained['exact'])}",
    ]
    if scope is not None:
        made_of = ", ".join(f"{name} {value}" for name, value in scope["made_of"].items() if name != "fields")
        lines += [f"scope: {scope['hash'] or 'none'} of {made_of}, fields {', '.join(scope['made_of']['fields'])}"]
    if explained["point"] is not None:
        lines.append("point: " + ", ".join(f"{name} {_figure(value)}" for name, value in explained["point"].items()))
    lines.append(f"load: {explained['load']['level']:.2f}, relief {explained['load']['relief']:.2f}")
    if explained["budget"] is not None:
        budget = explained["budget"]
        lines.append(f"budget: {budget['standing']}, {budget['checked']} of {budget['hits']} hits checked")
    for item in explained["neighbours"]:
        said = f"probability {_figure(item['probability'])}" if item["probability"] is not None else ""
        words = " ".join(part for part in (item["stage"], item["guard"], said) if part)
        lines.append(
            f"  {item['similarity']:.4f}  entry {item['entry']}  {words}  {' '.join(item['text'].split())[:100]}"
        )
    return "\n".join(lines)


def _exact(exact: Mapping[str, Any]) -> str:
    if exact["entry"] is None:
        return "nothing stored"
    return f"entry {exact['entry']}" + (f", {exact['objection']}" if exact["objection"] else "")


def learnt_table(categories: Mapping[str, Mapping[str, Any]]) -> str:
    """What was learnt of each category, for people."""
    rows = [_HEADS, *(_row(name, learnt) for name, learnt in categories.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(name: str, learnt: Mapping[str, Any]) -> tuple[str, ...]:
    budget, economics = learnt["budget"], learnt["economics"]
    kept = (
        ("not kept", *["-"] * 5)
        if budget is None
        else (
            budget["standing"],
            _figure(budget["point"]),
            str(budget["hits"]),
            str(budget["checked"]),
            _figure(budget["wrong"]),
            _figure(budget["savings"]),
        )
    )
    worth = (_figure(economics["hit_rate"]), _figure(economics["break_even"]), str(economics["stage"]))
    return (name, _figure(learnt["error_budget"]), *kept, *worth)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
