"""`filao sandbox`: the scenario EVT-02 in a browser, or in the terminal."""

import os
import socket
import sys
import webbrowser
from collections.abc import Callable
from importlib.util import find_spec

import click

from filao.cli.shell import note, usage

PORT = 8747
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command(name="sandbox")
@click.option("--port", type=click.IntRange(0, 65_535), default=PORT, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Another than loopback needs --token.")
@click.option("--token", help="Let in only who knows it. Needed to listen on more than loopback.")
@click.option("--no-browser", is_flag=True, help="Open no browser: print the address only.")
@click.option("--terminal", is_flag=True, help="Play the scenario in this terminal instead, once, and print a ledger.")
def sandbox_command(*, port: int, host: str, token: str | None, no_browser: bool, terminal: bool) -> int:
    """Open the sandbox of EVT-02: create the claims queue, and watch competing consumers at work.

    It runs real processes on a real queue in a temporary folder. Every browser has a room of its own, which ends when
    its page is closed. Ctrl-C ends all of it and leaves nothing behind.
    """
    if terminal:
        from filao.sandbox.terminal import play

        return int(play.main(args=[], prog_name="filao sandbox --terminal", standalone_mode=False) or 0)
    if os.name != "posix":
        raise usage("the sandbox stops and kills processes as Linux and macOS do it; it does not run here")
    if not find_spec("nicegui"):
        raise usage("the sandbox needs the extra `web`: pip install 'filao[web]'. Or play it here, with --terminal")
    if host not in LOOPBACK and not token:
        raise usage(f"--host {host} can be reached from elsewhere: add --token, without which nobody is let in")
    if token is not None and len(token) < 8:
        raise usage("--token: a token that is shorter than 8 characters is soon guessed")
    with _listening(host, port) as listening:
        from filao.sandbox.web.server import serve

        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.getsockname()[1]}/"
        serve(listening, token, _opened(address + (f"?token={token}" if token else ""), browser=not no_browser))
    return 0


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        hint = "Another sandbox may run there. Take another: --port 0 finds a free one."
        raise OSError(error.errno, f"cannot listen ({error.strerror}). {hint}", f"port {port} of {host}") from error
    listening.listen()
    return listening


def _opened(address: str, *, browser: bool) -> Callable[[], None]:
    """Return what says where the sandbox is, once it answers."""

    def opened() -> None:
        note(f"the sandbox is open: {address}   (Ctrl-C ends it)")
        sys.stderr.flush()
        if browser:
            webbrowser.open(address)

    return opened
