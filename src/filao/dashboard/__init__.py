"""The dashboard: watch queues, find out why messages died, and send them back.

`app` returns an ASGI application that Starlette, FastAPI or Django can mount under any prefix; `filao dashboard` serves
it alone. It needs the extra `dashboard`. See `door.py` for whom it lets in, and `watch.py` for what it costs.
"""

from collections.abc import Collection, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from filao.extras import Extra

with Extra("filao[dashboard]", of="filao.dashboard"):
    import_module("jinja2")  # of its pages
    from starlette.types import ASGIApp, Receive, Scope, Send

from filao import codec
from filao.broker import Broker, overview_of
from filao.dashboard.acts import Doing
from filao.dashboard.door import TOKEN_LEAST, Admit, Door, is_loopback_only
from filao.dashboard.jobs import Jobs
from filao.dashboard.pages import Pages
from filao.dashboard.views import Redact, Views
from filao.dashboard.watch import Watch
from filao.door import LOOPBACK, odd_host
from filao.errors import ConfigurationError
from filao.queue import Queue

__all__ = ["Dashboard", "app"]


class Dashboard:
    """An ASGI application; `app` makes it."""

    def __init__(self, door: ASGIApp, closing: Sequence[Any]) -> None:
        self._door = door
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self._door(scope, receive, send)

    async def close(self) -> None:
        """End all that has begun here, including live pages; the broker stays open.

        Deeds under way are recorded as stopped.
        """
        for one in self._closing:
            await one.close()


def app(
    broker: Broker,
    *,
    token: str | None = None,
    admit: Admit | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    allow_actions: bool = False,
    redact: Redact | None = None,
    queues: Sequence[Queue[Any]] = (),
) -> Dashboard:
    """Return the dashboard of a broker, which it opens at the first request; give it a broker of its own.

    Without `token` and `admit` it answers only its own machine. With `token` it asks for that. `admit` gets the ASGI
    scope and returns the name of the user, or None for one that is not let in; it may be a coroutine function. `hosts`
    are the names of hosts that it answers to, without a port; None: any. With `allow_actions` it can also redrive,
    discard, purge and pause; each such deed is written into a log in the store. `redact` returns a message as it may be
    shown. `queues` have the types that edited bodies must fit. Raises `ConfigurationError` for an argument that is
    none, and when other machines could use it without a token or `admit`.
    """
    queues = tuple(queues)
    _check(broker, hosts, queues)
    token = None if token is None else token.strip()  # a file of secrets may end in a line end, which nobody types
    if token is not None and len(token) < TOKEN_LEAST:
        raise ConfigurationError(f"token has {len(token)} characters; fewer than {TOKEN_LEAST} are soon guessed")
    if token is not None and admit is not None:
        raise ConfigurationError("give token or admit, not both: one of them decides who may come in")
    if token is None and admit is None and not is_loopback_only(hosts):
        raise ConfigurationError(
            "hosts names others than this machine, so the dashboard must know who asks: give token=, or admit="
        )

    overview = partial(overview_of, broker)
    watch, jobs, views = Watch(broker), Jobs(overview), Views(broker, overview, redact)
    pages = Pages(watch, views, jobs, Doing(broker, overview, queues), allow_actions=allow_actions)
    door = Door(pages.application(), pages.enter, token=token, admit=admit, hosts=hosts)
    return Dashboard(door, (jobs, views.triage, watch))


def _check(broker: object, hosts: Collection[str] | None, queues: Sequence[object]) -> None:
    """Raise `ConfigurationError` for what would fail, or turn everybody away, no sooner than at the first request."""
    if not isinstance(broker, Broker):
        raise ConfigurationError(f"broker is {codec.shown(broker)}; give one of filao.connect, of the dashboard's own")
    if isinstance(hosts, str):
        raise ConfigurationError(f"hosts is the text {hosts!r}, which would be read letter by letter; give [{hosts!r}]")
    if (odd := odd_host(hosts or ())) is not None:
        raise ConfigurationError(
            f"hosts has {odd!r}, and no request names that: give a host's name alone, such as 'ops.example.com', in "
            "ASCII, without a scheme, a port, brackets or a path"
        )
    if others := [one for one in queues if not isinstance(one, Queue)]:
        raise ConfigurationError(
            f"queues has {codec.shown(others[0])}; give a list of filao.Queue, whose types are checked"
        )
