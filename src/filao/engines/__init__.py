"""From a URL to the engine that keeps its promises."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from filao.codec import shown
from filao.engines.sqlite import SqliteEngine
from filao.engines.sqlite.files import MEMORY
from filao.errors import ConfigurationError
from filao.moving import Movable
from filao.urls import has_scheme, is_bare, shown_url

Durability = Literal["full", "relaxed"]

_URLS = (
    "sqlite:///relative.db, sqlite:////absolute.db, sqlite://:memory:, postgresql://user@host/database or "
    "amqp://user@host/vhost"
)
_NO_SLASHES = re.compile(r"(sqlite|file|postgres(ql)?|amqps?):", re.IGNORECASE)


def engine_for(url: str | Path, *, durability: Durability = "full", clock: Callable[[], float] = time.time) -> Movable:
    """Return the engine, not yet open, for a URL or a path."""
    if durability not in ("full", "relaxed"):
        raise ConfigurationError(f'durability is {shown(durability)}; it must be "full" or "relaxed"')
    durable = durability == "full"
    scheme = url.partition("://")[0].lower() if isinstance(url, str) and has_scheme(url) else ""
    if isinstance(url, str) and scheme in ("postgresql", "postgres"):
        return _postgresql(_lower(url), durable=durable, clock=clock)
    if isinstance(url, str) and scheme in ("amqp", "amqps"):
        return _rabbitmq(_lower(url), clock=clock)
    return SqliteEngine(sqlite_path(url), durable=durable, clock=clock)


def _lower(url: str) -> str:
    """Return a URL with its scheme in lower case, as libraries want it."""
    scheme, mark, rest = url.partition("://")
    return scheme.lower() + mark + rest


def located(url: str | Path) -> str | Path:
    """Return a URL or a path that names the same storage even after the process has changed its working folder."""
    if isinstance(url, str) and has_scheme(url) and not url.lower().startswith("sqlite:"):
        return url
    path = sqlite_path(url)
    try:
        return path if path == MEMORY else path.absolute()
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{path} leads nowhere: the folder in which this process works is gone; give the whole path"
        ) from error


def _postgresql(url: str, *, durable: bool, clock: Callable[[], float]) -> Movable:
    from filao.engines.postgresql import PostgresqlEngine  # an extra

    return PostgresqlEngine(url, durable=durable, clock=clock)


def _rabbitmq(url: str, *, clock: Callable[[], float]) -> Movable:
    from filao.engines.rabbitmq import RabbitmqEngine  # an extra

    return RabbitmqEngine(url, clock=clock)


def sqlite_path(url: str | Path) -> Path:
    """Return the file that a URL or a path names. Raises `ConfigurationError` for what cannot be right."""
    if isinstance(url, Path):
        return url
    if not isinstance(url, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
        raise ConfigurationError(f"a URL is a text, and a path a text or a pathlib.Path: neither is {shown(url)}")
    if not url:
        raise ConfigurationError('the URL is empty; give a path such as "claims.db", or sqlite://:memory:')
    if "\0" in url:
        raise ConfigurationError(f"{shown_url(url)!r} is no path: it holds a NUL character")
    if not has_scheme(url):
        if is_bare(url):  # not the name of a file: errors would show its password
            raise ConfigurationError(
                f"{shown_url(url)!r} looks like a URL without its scheme; give postgresql://… or amqp://…, or ./ "
                "before a path"
            )
        if _NO_SLASHES.match(url):
            raise ConfigurationError(
                f"{shown_url(url)!r} looks like a URL without the // behind its scheme; give ./ before a path, {_URLS}"
            )
        return Path(url)
    if url in ("sqlite://:memory:", "sqlite:///:memory:"):
        return Path(":memory:")
    scheme, _, path = url.partition("://")
    if (plain := scheme.lower().partition("+")[0]) in ("sqlite", "postgresql", "postgres") and "+" in scheme:
        raise ConfigurationError(
            f"{shown_url(url)!r} names a driver, which Filao chooses itself: begin with {plain}://"
        )
    if scheme.lower() != "sqlite" or not path.startswith("/") or not path[1:] or "?" in path:
        raise ConfigurationError(f"{shown_url(url)!r} is no URL that Filao knows; give a path, {_URLS}")
    return Path(unquote(path[1:]))
