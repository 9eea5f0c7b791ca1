"""`filao dashboard`: watch queues in a browser, find out why messages died, and send them back."""

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable
from importlib import import_module
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

import click

from filao.broker import Broker, connect
from filao.cli.pages import address_of, listening_at, shown_address
from filao.cli.shell import addressed, check_file, note, usage
from filao.cli.target import NOTHING, found_in, imported
from filao.codec import shown
from filao.extras import Extra
from filao.queue import Queue

if TYPE_CHECKING:
    from filao.dashboard import Dashboard

PORT = 8748
ENDS_WITHIN = 2  # seconds for connections to close
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL]")
@click.option(
    "--listen",
    default=str(PORT),
    show_default=True,
    metavar="[HOST:]PORT",
    help="0 takes a free port. Another HOST than loopback opens it to other machines, and asks for a token.",
)
@click.option("--host-name", "names", multiple=True, metavar="NAME", help="With HOST: the names that it answers to.")
@click.option(
    "--token", "wants_token", is_flag=True, help="Ask for a token on loopback too: FILAO_TOKEN, or a new one."
)
@click.option("--allow-actions", is_flag=True, help="Redrive, discard, purge and pause too; without it, only look.")
@click.option("--redact", metavar="MODULE:FUNCTION", help="Returns a stored message as it may be shown.")
@click.option("--type", "typed", multiple=True, metavar="MODULE:QUEUE", help="A queue whose edited bodies are checked.")
@click.option("--browser", is_flag=True, help="Open a browser.")
def dashboard(
    *,
    arguments: tuple[str, ...],
    listen: str,
    names: tuple[str, ...],
    wants_token: bool,
    allow_actions: bool,
    redact: str | None,
    typed: tuple[str, ...],
    browser: bool,
) -> int:
    """Serve a dashboard of the queues until Ctrl-C.

    It shows depth, age, rates, dead letters by kind, and who receives. It answers to this machine alone, without a
    token; to other machines with HOST, and a token, which FILAO_TOKEN sets. What is done there with --allow-actions
    stands in a log in the store, which `filao log` prints. It is also to be mounted in an application of yours: see
    filao.dashboard.app. It needs pip install 'filao[dashboard]'.
    """
    with Extra("filao[dashboard]", of="filao dashboard"):
        import_module("uvicorn")  # of `_serve`
    from filao.dashboard import app

    url, _ = addressed(arguments, least=0, most=0)
    check_file(url)
    host, port = address_of("--listen", listen)
    is_open = host not in LOOPBACK
    given = os.environ.get("FILAO_TOKEN", "").strip()
    token = (given or secrets.token_urlsafe(18)) if is_open or wants_token else None
    shows = None if redact is None else _redaction(redact)
    queues = [_loaded("--type", one) for one in typed]
    if wrong := [one for one in queues if not isinstance(one, Queue)]:
        raise usage(f"--type: {shown(wrong[0])} is no filao.Queue")
    hosts = (names or None) if is_open else LOOPBACK
    broker = connect(url)
    served = app(broker, token=token, hosts=hosts, allow_actions=allow_actions, redact=shows, queues=queues)
    with listening_at("--listen", host, port) as listening:

        def opened() -> None:
            address = shown_address(host, listening.getsockname()[1])
            note(f"the dashboard is at {address}   (Ctrl-C ends it)")
            if token is not None:
                note(f"its token: {'what FILAO_TOKEN holds' if given else token}")
            sys.stderr.flush()
            if browser:
                webbrowser.open(address)

        asyncio.run(_serve(served, broker, listening, opened))
    return 0


async def _serve(served: "Dashboard", broker: Broker, listening: socket.socket, opened: Callable[[], None]) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Ends the streams of open pages first, because uvicorn would wait for them."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await served.close()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        served,
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=ENDS_WITHIN,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
    )
    try:
        opened()
        with contextlib.suppress(KeyboardInterrupt):
            await Server(config).serve(sockets=[listening])
    finally:
        await served.close()
        await broker.close()


def _redaction(target: str) -> Any:
    found = _loaded("--redact", target)
    if not callable(found) or iscoroutinefunction(found):
        raise usage(f"--redact: {shown(found)} is no function that returns a message at once")
    return found


def _loaded(option: str, target: str) -> Any:
    """Return the object that MODULE:NAME names."""
    module, _, name = target.partition(":")
    if not module or not name:
        raise usage(f"{option} {target!r}: give MODULE:NAME")
    found = found_in(imported(module), name)
    if found is NOTHING:
        raise usage(f"{option} {target!r}: there is no {name!r} in {module!r}")
    return found
