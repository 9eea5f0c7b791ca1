"""`filao sandbox`: the scenario EVT-02 in a browser, or in the terminal."""

import os
import secrets
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path

import click

from filao.cli.pages import listening_at, shown_address
from filao.cli.shell import Number, note, usage

PORT = 8747
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_LEAST = 8  # characters
LANGUAGES = ("en", "fr")
SPEEDS = (0.25, 10.0)  # slower, nobody waits for it; faster, nobody sees it
OPENER = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url={address}">'


@click.command(name="sandbox")
@click.option("--port", type=click.IntRange(0, 65_535), default=PORT, show_default=True, help="0 takes a free one.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Another than loopback opens it to other machines."
)
@click.option("--allow-code", is_flag=True, help="With --host: let visitors run the code of step 11, as you.")
@click.option("--no-browser", is_flag=True, help="Open no browser: print the address only.")
@click.option("--terminal", is_flag=True, help="Play the same lesson in this terminal.")
@click.option("--language", type=click.Choice(LANGUAGES), default="en", show_default=True, help="Of the terminal.")
@click.option(
    "--speed",
    type=Number(*SPEEDS),
    default=1.0,
    show_default=True,
    help="How many times as fast the lesson's consumers work.",
)
def sandbox_command(
    *, port: int, host: str, allow_code: bool, no_browser: bool, terminal: bool, language: str, speed: float
) -> int:
    """Open the sandbox of EVT-02: a claims queue to play with.

    You create the queue, and watch competing consumers at work. It runs real processes on a real queue in a temporary
    folder. Every browser has a room of its own, which ends when its page is closed. Ctrl-C ends all of it and leaves
    nothing behind. The address that it prints ends with a token, without which nobody is let in; FILAO_TOKEN sets
    another one.
    """
    if os.name != "posix":
        raise usage("the sandbox stops and kills processes as Linux and macOS do it; it does not run here")
    if terminal:
        from filao.sandbox.terminal import play

        return play("fr" if language == "fr" else "en", speed)
    from filao.sandbox.web.server import serve

    token = os.environ.get("FILAO_TOKEN", "").strip() or secrets.token_urlsafe(16)
    if len(token) < TOKEN_LEAST:
        raise usage(f"FILAO_TOKEN: a token that is shorter than {TOKEN_LEAST} characters is soon guessed")
    is_open = host not in LOOPBACK
    with listening_at("--host and --port", host, port) as listening:
        address = f"{shown_address(host, listening.getsockname()[1])}?token={token}"
        opened = _opened(address, browser=not no_browser)
        may_run_code = allow_code or not is_open
        try:
            serve(listening, token, opened, open_to_others=is_open, may_run_code=may_run_code, speed=speed)
        finally:
            note("ended: all processes of the sandbox are gone, and its files are removed")
    return 0


def _opened(address: str, *, browser: bool) -> Callable[[str], None]:
    """Return a function that says where the sandbox is, to be called once it answers."""

    def opened(folder: str) -> None:
        note(f"the sandbox is open: {address}   (Ctrl-C ends it)")
        sys.stderr.flush()
        if browser:  # through a file of ours: what a browser is started with, others of this machine can read
            opener = Path(folder) / "open.html"
            opener.touch(mode=0o600)
            opener.write_text(OPENER.format(address=address), encoding="utf-8")
            webbrowser.open(opener.as_uri())

    return opened
