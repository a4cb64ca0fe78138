"""`hitpath cache …`: operate on a running gateway (`--url`) or on a data directory."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from cachestore import EntryRow, Filter, StoreError, offline
from gateway import explain_cli, truststate
from gateway.explain_cli import learnt_table
from gateway.settings import SettingsError
from gateway.trust import stats_of

_TIMEOUT = 60.0
_PAGE = 1000


class _Source(Protocol):
    """Where the entries are."""

    def stats(self) -> dict[str, Any]: ...

    def entries(self, wanted: Filter, limit: int, *, bodies: bool = False) -> list[dict[str, Any]]: ...

    def purge(self, wanted: Filter, *, dry_run: bool) -> int: ...

    def problems(self) -> list[str]: ...


class _Directory:
    """A data directory; reading works beside a running gateway, writing does not."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def stats(self) -> dict[str, Any]:
        stats = offline.stats(self._path)
        return {
            "entries": stats.entries,
            "disk_used": stats.disk_used,
            "disk_by_category": {name: size for name, (_, size) in stats.by_category.items()},
            "entries_by_category": {name: count for name, (count, _) in stats.by_category.items()},
            "categories": _learnt(self._path),
        }

    def entries(self, wanted: Filter, limit: int, *, bodies: bool = False) -> list[dict[str, Any]]:
        return [_plain(row) for row in offline.entries(self._path, wanted, limit=limit, bodies=bodies)]

    def purge(self, wanted: Filter, *, dry_run: bool) -> int:
        return len(offline.purge(self._path, wanted, dry_run=dry_run))

    def problems(self) -> list[str]:
        return offline.verify(self._path)


def _learnt(directory: Path) -> dict[str, Any]:
    """What the gateway on a directory has written down of its categories. Raises StoreError when that is damaged."""
    path = directory / truststate.NAME
    try:
        plain = truststate.read(path)
        return {} if plain is None else stats_of(plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be used: {error}") from error


class _Gateway:
    """A running gateway's admin endpoints."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = key

    def stats(self) -> dict[str, Any]:
        return self._ask("GET", "stats")

    def entries(self, wanted: Filter, limit: int, *, bodies: bool = False) -> list[dict[str, Any]]:
        asked = {**_asked(wanted), "limit": min(limit, _PAGE), "bodies": bodies}
        found: list[dict[str, Any]] = self._ask("POST", "entries", asked)["entries"]
        return found

    def purge(self, wanted: Filter, *, dry_run: bool) -> int:
        return int(self._ask("POST", "purge", {**_asked(wanted), "dry_run": dry_run})["purged"])

    def problems(self) -> list[str]:
        return list(self._ask("POST", "check")["problems"])

    def _ask(self, method: str, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}/admin/{path}",
            method=method,
            data=None if document is None else json.dumps(document).encode(),
            headers={"authorization": f"Bearer {self._key}", "content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            raise StoreError(f"{self._url} answered {error.code}: {_message(error.read())}") from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{self._url} cannot be asked: {error}") from error


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `cache` and what belongs to it."""
    cache = commands.add_parser("cache", help="look at, purge, verify, export or import what is stored")
    verbs = cache.add_subparsers(required=True, metavar="VERB")
    for name, run, what in (
        ("stats", _stats, "counts and bytes"),
        ("ls", _ls, "list entries, newest first"),
        ("show", _show, "show one entry with its answer"),
        ("purge", _purge, "delete the entries that all given filters mean"),
        ("verify", _verify, "check the log, its rows and the index; exit code 1 if anything is wrong"),
    ):
        verb = verbs.add_parser(name, help=what)
        _source_options(verb)
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.set_defaults(run=run)
        if name in ("ls", "purge"):
            _filter_options(verb)
        if name == "ls":
            verb.add_argument("--limit", type=int, default=50, help="entries at most (50)")
        if name == "show":
            verb.add_argument("id", type=int, metavar="ID")
        if name == "purge":
            verb.add_argument("--dry-run", action="store_true", help="only say how many")
            verb.add_argument("--all", action="store_true", help="needed to purge without any filter")
    explain = verbs.add_parser("explain", help="say what the cache would do with a call, and why; asks no backend")
    explain.add_argument("text", metavar="TEXT", help="the user's question, or - for a request body on standard input")
    explain.add_argument("--url", default="http://127.0.0.1:8080", help="a running gateway (http://127.0.0.1:8080)")
    explain.add_argument("--key", help="the client's own key (or the variable HITPATH_KEY)")
    explain.add_argument("--model", default="bundled", help="the model asked for (bundled)")
    explain.add_argument("--system", help="a system text")
    explain.add_argument("--endpoint", choices=("chat", "responses"), default="chat", help="of a request body (chat)")
    explain.add_argument("--category", help="as x-hitpath-category")
    explain.add_argument("--namespace", help="as x-hitpath-namespace")
    explain.add_argument("--json", action="store_true", help="print one JSON object")
    explain.set_defaults(run=explain_cli.run)
    for name, run, what in (
        ("export", _export, "write entries as JSON lines"),
        ("import", _import, "read entries that export wrote"),
    ):
        verb = verbs.add_parser(name, help=what)
        verb.add_argument("--data-dir", type=Path, default=Path("hitpath-data"), metavar="DIR")
        verb.add_argument(
            "file", nargs="?", default="-", metavar="FILE", help="a file, or - for standard in- or output"
        )
        verb.set_defaults(run=run)


def _source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="a running gateway, such as http://127.0.0.1:8080")
    parser.add_argument("--admin-key", help="its admin key (or the variable HITPATH_ADMIN_KEY)")
    parser.add_argument("--data-dir", type=Path, default=Path("hitpath-data"), metavar="DIR", help="a data directory")


def _filter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--category")
    parser.add_argument("--tenant", help="the tenant's namespace, those inside it included")
    parser.add_argument("--model")
    parser.add_argument("--contains", metavar="TEXT", help="part of question or answer, without case")
    parser.add_argument("--id", type=int, action="append", default=[], help="may be given several times")


def _source(options: argparse.Namespace) -> _Source:
    if options.url is None:
        return _Directory(options.data_dir)
    key = options.admin_key or os.environ.get("HITPATH_ADMIN_KEY")
    if not key:
        raise SettingsError("--url needs --admin-key or the variable HITPATH_ADMIN_KEY")
    return _Gateway(options.url, key)


def _wanted(options: argparse.Namespace) -> Filter:
    return Filter(options.category, options.tenant, options.model, options.contains, tuple(options.id))


def _asked(wanted: Filter) -> dict[str, Any]:
    return {name: value for name, value in asdict(wanted).items() if value}


def _stats(options: argparse.Namespace) -> int:
    stats = _source(options).stats()
    if options.json:
        _print_json(stats)
        return 0
    categories = stats.pop("categories", {})
    for name, value in stats.items():
        shown = ", ".join(f"{key} {number:,}" for key, number in value.items()) if isinstance(value, dict) else value
        print(f"{name.replace('_', ' '):22} {shown:,}" if isinstance(shown, int) else f"{name:22} {shown}")
    if categories:
        print(f"\n{learnt_table(categories)}")
    return 0


def _ls(options: argparse.Namespace) -> int:
    entries = _source(options).entries(_wanted(options), options.limit)
    if options.json:
        _print_json({"entries": entries})
        return 0
    now = time.time()
    print(f"{'id':>8}  {'category':12} {'model':20} {'tenant':20} {'ttl':>8} {'hits':>6} {'bytes':>8}  question")
    for row in entries:
        question = " ".join(row["text"].split())[:60]
        print(
            f"{row['id']:>8}  {row['category']:12} {row['model'][:20]:20} {row['namespace'][:20]:20}"
            f" {row['expires'] - now:>7.0f}s {row['hits']:>6} {row['size']:>8}  {question}"
        )
    return 0


def _show(options: argparse.Namespace) -> int:
    found = _source(options).entries(Filter(ids=(options.id,)), 1, bodies=True)
    if not found:
        raise StoreError(f"there is no entry {options.id}")
    _print_json(found[0])
    return 0


def _purge(options: argparse.Namespace) -> int:
    wanted = _wanted(options)
    if wanted == Filter() and not options.all:
        raise SettingsError(
            "purge: name what to delete (--category, --tenant, --model, --contains, --id), or say --all"
        )
    count = _source(options).purge(wanted, dry_run=options.dry_run)
    if options.json:
        _print_json({"purged": count, "dry_run": options.dry_run})
    else:
        print(f"{count} entries {'would be purged' if options.dry_run else 'purged'}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    problems = _source(options).problems()
    if options.json:
        _print_json({"problems": problems})
    else:
        print("\n".join(problems) or "all is well")
    return 1 if problems else 0


def _export(options: argparse.Namespace) -> int:
    with nullcontext(sys.stdout) if options.file == "-" else Path(options.file).open("w", encoding="utf-8") as out:
        count = offline.export_entries(options.data_dir, out)
    print(f"{count} entries exported", file=sys.stderr)
    return 0


def _import(options: argparse.Namespace) -> int:
    with nullcontext(sys.stdin) if options.file == "-" else Path(options.file).open(encoding="utf-8") as lines:
        done = offline.import_entries(options.data_dir, lines)
    for problem in done.problems:
        print(f"hitpath: {options.file}: {problem}", file=sys.stderr)
    print(f"{done.stored} entries imported, {done.expired} expired, {len(done.problems)} skipped", file=sys.stderr)
    return 1 if done.problems else 0


def _plain(row: EntryRow) -> dict[str, Any]:
    plain = asdict(row) | {"key": row.key.hex(), "scope": row.scope.hex()}
    if row.body is None:
        del plain["body"]
    else:
        plain["body"] = json.loads(row.body)
    return plain


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode(errors="replace")


def _print_json(document: Sequence[Any] | dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))
