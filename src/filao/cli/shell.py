"""What all commands need of the shell that runs them: which queues they are about, and where their output goes."""

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from math import isnan
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

import click
import msgspec

from filao.broker import check_is_there, session_of
from filao.engine import Feature, OpenAgain
from filao.engines import located, sqlite_path
from filao.errors import ConfigurationError, QueueNotFound
from filao.printable import printable, printable_json
from filao.sync import Broker, connect, door_of
from filao.urls import has_scheme, shown_url

T = TypeVar("T")


class OutputClosedError(Exception):
    """The reader of our stdout went away. (click would take a `BrokenPipeError` for its own.)"""


class Number(click.FloatRange):
    """A number within bounds; click's own range lets `nan` pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or fail with an error that says what is wrong."""
        number = super().convert(value, param, ctx)
        if isnan(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


def addressed(arguments: tuple[str, ...], *, least: int, most: int) -> tuple[str, tuple[str, ...]]:
    """Return the URL and the other arguments, of which there are `least` to `most`.

    The number of arguments shows whether the first is the URL. If it does not, because FILAO_URL is set and one more
    argument is optional, the first is the URL if it has a character that no queue's name has.
    """
    default = os.environ.get("FILAO_URL", "")
    with_url = least < len(arguments) <= most + 1
    without = bool(default) and least <= len(arguments) <= most
    if with_url and without:
        without = not any(mark in arguments[0] for mark in "/:")
    if without:
        return default, arguments
    if with_url:
        return arguments[0], arguments[1:]
    if len(arguments) > least:
        raise usage(f"{len(arguments)} arguments are too many")
    if default:
        raise usage("give the queue")
    raise usage(f"give the URL{' and the queue' if least else ''}; or set FILAO_URL, and leave the URL out")


def usage(text: str) -> click.UsageError:
    """Return the error for wrong usage of the command that runs."""
    return click.UsageError(text, click.get_current_context())


@contextmanager
def broker_at(url: str, queue: str = "QUEUE", *, create: bool = False) -> Generator[Broker]:
    """Open the broker; only `declare` creates a file that does not exist, so that no typing error does.

    `queue` is the command's queue, for the hint if it does not exist.
    """
    check_file(url, queue, create=create)
    try:
        with connect(url) as broker:
            yield broker
    except QueueNotFound as error:
        default = os.environ.get("FILAO_URL", "")
        hint = (
            f" FILAO_URL is {shown_url(default)}; a path in its place holds a slash, as ./claims.db does."
            if default
            else ""
        )
        raise QueueNotFound(f"{error} In a shell: {declaring(url, queue)}.{hint}") from error


def check_file(url: str, queue: str = "QUEUE", *, create: bool = False) -> None:
    """Raise `ConfigurationError` for a URL of a file that does not exist, or that would end with the command."""
    file = file_of(url)
    if str(file) == ":memory:":
        raise ConfigurationError(
            "a queue in memory would end with this command, and all that is in it: give the path of a file"
        )
    if file is not None and not create and not file.exists():
        folder = Path(located(url)).parent
        if file.is_symlink():
            next_step = f"It is a link to {file.readlink()}, where nothing is. Is a disk not mounted?"
        elif not folder.is_dir():
            next_step = f"There is no folder {folder}. Is it misspelt, or a disk not mounted?"
        else:
            next_step = f"Declare a queue first: {declaring(url, queue)}"
        raise ConfigurationError(f"no such file: {file}. {next_step}")


def declaring(url: str, queue: str = "QUEUE") -> str:
    """Return the command that declares a queue, as a shell takes it."""
    names = [shown_url(url), queue]
    return shlex.join(["filao", "declare", *(["--"] if any(name.startswith("-") for name in names) else []), *names])


def read_anew(broker: Broker, read: Callable[[], T]) -> T:
    """Read what a command watches; if the storage was replaced, open what is there now and read that."""
    check_is_there(door_of(broker))
    broker.open()  # again, if it failed the last time
    try:
        return read()
    except OpenAgain:
        broker.close()
        check_is_there(door_of(broker))
        broker.open()
        return read()


def untold(broker: Broker, shown: str) -> str:
    """Return what an engine does not tell of its queues, and what is `shown` instead; empty if it tells all."""
    if Feature.COUNTERS in broker.features:
        return ""
    return (
        f"{session_of(door_of(broker)).engine.name} tells what is ready, what is dead, and what this process holds. It "
        "does not tell what is delayed, blocked or held by others, ages, reasons, whether a queue is paused, who "
        f"receives, nor what was ever sent, received, acked or died: those are {shown} here"
    )


def file_of(url: str) -> Path | None:
    """Return the file that a URL names; None for the URL of a server."""
    return sqlite_path(url) if not has_scheme(url) or url.lower().startswith("sqlite://") else None


def as_json(value: object) -> bytes:
    """Return a line of output."""
    try:
        return printable_json(msgspec.json.encode(value))
    except UnicodeEncodeError:  # a file's name that is no UTF-8: written so that Python reads the same name
        return printable_json(json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode())


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal."""
    return stream is not None and stream.isatty()  # it is None if the shell has closed it


def standard_input() -> BinaryIO:
    """Return stdin as bytes."""
    if sys.stdin is None:
        raise OSError(errno.EBADF, "closed: give BODY or --file", "stdin")
    return sys.stdin.buffer


@contextmanager
def signals() -> Generator[int]:
    """Yield a descriptor that can be read once a signal has come, even one that comes just before the wait."""
    signalled, tell = os.pipe()
    os.set_blocking(signalled, False)
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    try:
        yield signalled
    finally:
        signal.set_wakeup_fd(before)
        os.close(signalled)
        os.close(tell)


def confirmed(command: str, question: str) -> bool:
    """Ask before something is deleted for good."""
    if not is_terminal(sys.stdin):
        raise usage(f"{command} deletes for good, and there is no terminal to ask on: give --yes")
    return click.confirm(question, err=True)


def print_lines(lines: Iterable[bytes]) -> None:
    """Write lines to stdout, past every buffer: once this returns, they are with the reader."""
    content = memoryview(b"".join(line + b"\n" for line in lines))
    if sys.stdout is None:
        raise OSError(errno.EBADF, "closed", "stdout")
    try:
        while content:
            content = content[os.write(sys.stdout.fileno(), content) :]
    except BrokenPipeError as error:
        raise OutputClosedError from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from error


def note(text: str) -> None:
    """Write a note to the user on stderr, unless it cannot be written, as on a full disk."""
    with suppress(OSError):
        click.echo(f"filao: {safe(text)}", err=True)


def safe(text: str) -> str:
    """Return a text that is safe on stderr: without control characters, and without the passwords of arguments."""
    for given in [*sys.argv[1:], os.environ.get("FILAO_URL", "")]:
        shown = shown_url(given)
        if shown != given:
            text = text.replace(given, shown).replace(repr(given)[1:-1], shown)
    return printable(text)


def shown_body(body: object) -> dict[str, object]:
    """Return a body as JSON can hold it, with a mark that tells bytes from an object that looks the same."""
    if isinstance(body, bytes):
        return {"body": {"base64": body}, "bytes": True}
    return {"body": body, "bytes": False}
