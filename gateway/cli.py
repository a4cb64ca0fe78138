"""The `hitpath` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import yaml

from cachestore.errors import StoreError
from gateway import cache_cli
from gateway.embedding import EmbedderError
from gateway.errors import CannotListenError
from gateway.judge import JudgeError
from gateway.settings import Settings, SettingsError, load, validate
from gateway.supervise import EngineFailedError

_ELSEWHERE = {"engine": "engine", "eval": "loadtest.evaluate", "replay": "loadtest.replay"}
"""Commands that are programs of their own: the gateway imports neither the engine nor what measures."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 when all is well, 1 when it failed, 2 when the command line or settings are wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in _ELSEWHERE:
        _become(_ELSEWHERE[given[0]], given[1:])
    options = _parser().parse_args(given)
    try:
        return int(options.run(options))
    except SettingsError as error:
        return _fail(error, 2)
    except (StoreError, EmbedderError, JudgeError, EngineFailedError, CannotListenError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130


def _become(module: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by the module; -P keeps the working directory's folders from taking its place."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


def _fail(error: Exception, status: int) -> int:
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"hitpath: {line}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hitpath", description="A caching gateway in front of LLM backends.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the gateway")
    _settings_options(serve)
    serve.set_defaults(run=_serve)
    config = commands.add_parser("config", help="check or show the settings").add_subparsers(required=True)
    check = config.add_parser("check", help="validate a settings file")
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=_check)
    show = config.add_parser("show", help="print the effective settings as YAML")
    _settings_options(show)
    show.set_defaults(run=_show)
    cache_cli.add_commands(commands)
    for name, what in (
        ("engine", "run the bundled engine alone"),
        ("eval", "measure the semantic tier on labelled pairs, or the classifier"),
        ("replay", "replay a trace against a gateway"),
    ):
        commands.add_parser(name, help=f"{what} (hitpath {name} --help)", add_help=False)
    return parser


def _settings_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file (YAML)")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one (8080)")
    parser.add_argument("--uds", type=Path, metavar="PATH", help="listen on a UNIX socket instead")
    parser.add_argument("--upstream", metavar="URL", help="backend's base URL, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where entries are kept (./hitpath-data)")


def effective_settings(options: argparse.Namespace) -> Settings:
    """Return the settings file with the command line's options over it. Raises SettingsError."""
    settings = load(options.config)
    server = {name: getattr(options, name) for name in ("host", "port", "uds") if getattr(options, name) is not None}
    over: dict[str, Any] = {}
    if server:
        over["server"] = settings.server.model_dump(exclude_unset=True) | server
    if options.data_dir is not None:
        over["data_dir"] = options.data_dir
    if options.upstream is not None:
        over["upstreams"] = [_upstream(options.upstream)]
    return validate(settings.model_dump(exclude_unset=True) | over, source="command line") if over else settings


def _upstream(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingsError(f"--upstream: {url!r} is not a URL such as http://127.0.0.1:8000/v1")
    # Named after its address: another backend's answers are not this one's.
    address = parts.netloc.rpartition("@")[2].replace("[", "ipv6:").replace("]", "")
    return {"name": address, "kind": "openai", "url": url}


def _serve(options: argparse.Namespace) -> int:
    # Only here: the other commands need neither the server nor the embedder's libraries.
    from gateway.server import configure_logging, run

    settings = effective_settings(options)
    configure_logging()
    run(settings)
    return 0


def _check(options: argparse.Namespace) -> int:
    load(options.file)
    print(f"{options.file}: fine")
    return 0


def _show(options: argparse.Namespace) -> int:
    print(yaml.safe_dump(effective_settings(options).document(), sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
