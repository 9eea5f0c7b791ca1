"""What `filao send` reads: lines that become messages, as they come, in slices that are stored all or none."""

import os
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec
from msgspec.structs import replace

from filao.cli.shell import signals
from filao.codec import DEPTH_MAX, is_too_deep
from filao.draft import Outgoing, draft
from filao.errors import FilaoError, MessageNotEncodable, MessageTooLarge
from filao.queue import BODY_MAX_EVER, Queue

SLICE_MAX = 1_000  # messages stored as one: they share a flush of the disk, and hold the write lock for some 10 ms
READ_MAX = 1024 * 1024  # bytes taken from the input at once, which bounds what a slice of long lines holds in memory
LINE_MAX = 2 * BODY_MAX_EVER  # bytes: the largest body there may be, in base64, with its headers
_TOO_DEEP = f"the JSON text is nested more than {DEPTH_MAX} deep"


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of `send --messages`: what `receive`, `peek` and `dead` print, or what anyone writes in their manner."""

    body: msgspec.Raw
    is_bytes: bool = msgspec.field(default=False, name="bytes")
    headers: dict[str, str] | None = None
    group: str | None = None
    delay: float | None = None
    priority: int | None = None
    ttl: float | None = None
    dedup_key: str | None = None
    message_id: str | None = None
    # What they print of the old message, which a new one does not take over. An id that was sent twice within the
    # deduplication window would be a duplicate, and a message that goes to and fro would vanish.
    id: object = None
    queue: object = None
    state: object = None
    attempt: object = None
    attempts: object = None
    sent_at: object = None
    at: object = None
    expires_at: object = None
    reason: object = None
    error: object = None
    history: object = None
    consumer: object = None


class _Base64(msgspec.Struct, forbid_unknown_fields=True):
    """How bytes are written in JSON."""

    base64: bytes


Reader = Callable[[bytes], Outgoing[Any]]


@dataclass(frozen=True, slots=True)
class Slice:
    """Messages that are stored as one."""

    messages: list[Outgoing[Any]]
    last_line: int
    """The number of lines of the input up to its end."""
    last_byte: int
    """The number of bytes of the input up to its end."""


def reader(queue: Queue[Any], terms: Outgoing[Any], *, raw: bool, messages: bool) -> Reader:
    """Return a function that makes a message of a line, or raises the error that says why it cannot be one."""

    def read(line: bytes) -> Outgoing[Any]:
        if raw:
            outgoing = replace(terms, body=line)
        elif messages:
            outgoing = _whole_message(line, terms)
        else:
            outgoing = replace(terms, body=json_text(line))
        draft(queue, outgoing)  # raises what sending would raise, while the number of the line is known
        return outgoing

    return read


def json_text(line: bytes) -> msgspec.Raw:
    """Return a JSON text as it was written: numbers keep their digits, and objects their order."""
    text = line.strip()
    try:
        msgspec.json.decode(text)
    except RecursionError as error:
        raise MessageNotEncodable(_TOO_DEEP) from error
    except ValueError as error:
        shown = text[:60].decode(errors="replace")
        raise MessageNotEncodable(
            f"{shown!r} is not JSON: {error}. A text stands in double quotes, as in '\"text\"'."
        ) from error
    if is_too_deep(text):
        raise MessageNotEncodable(_TOO_DEEP)
    return msgspec.Raw(text)


def _whole_message(line: bytes, terms: Outgoing[Any]) -> Outgoing[Any]:
    """Return the message in a line of `send --messages`."""
    try:
        read = msgspec.json.decode(line, type=_Line)
        body = msgspec.json.decode(read.body, type=_Base64).base64 if read.is_bytes else json_text(bytes(read.body))
    except RecursionError as error:
        raise MessageNotEncodable(_TOO_DEEP) from error
    except ValueError as error:
        raise MessageNotEncodable(f"not a message: {error}. See: filao send --help") from error
    return Outgoing(
        body,
        headers={**(terms.headers or {}), **(read.headers or {})},
        group=terms.group if read.group is None else read.group,
        delay=terms.delay if read.delay is None else read.delay,
        priority=terms.priority if read.priority is None else read.priority,
        ttl=terms.ttl if read.ttl is None else read.ttl,
        dedup_key=read.dedup_key,
        message_id=read.message_id,
    )


def slices(stream: BinaryIO, read: Reader, *, blank: bool) -> Iterator[Slice]:
    """Yield messages that can be stored as one; raise the error of a bad line after those before it.

    `blank`: even a blank line is a message.
    """
    number = position = 0
    for lines in _arriving(stream):
        ready: list[Outgoing[Any]] = []
        for line in lines:
            try:
                if blank or line.strip():
                    ready.append(_read_line(line, read))
            except FilaoError as error:
                if ready:
                    yield Slice(ready, number, position)
                raise type(error)(f"line {number + 1}: {error}") from error
            number += 1
            position += len(line) + 1
            if len(ready) == SLICE_MAX:
                yield Slice(ready, number, position)
                ready = []
        if ready:
            yield Slice(ready, number, position)


def _read_line(line: bytes, read: Reader) -> Outgoing[Any]:
    if len(line) > LINE_MAX:
        raise MessageTooLarge(f"it is longer than {LINE_MAX:,} bytes, which no message takes")
    return read(line)


def _arriving(stream: BinaryIO) -> Iterator[list[bytes]]:
    """Yield whole lines as they come, without waiting for more; a line that is too long comes without its end."""
    held = bytearray()
    with signals() as signalled:
        while len(held) <= LINE_MAX and (chunk := _next_chunk(stream.fileno(), signalled)):
            held += chunk
            if b"\n" in chunk:
                *lines, rest = bytes(held).split(b"\n")
                held = bytearray(rest)
                yield lines
    if held:
        yield [bytes(held)]


def _next_chunk(descriptor: int, signalled: int) -> bytes:
    """Return the next input; a signal interrupts the wait, so that its handler, such as Ctrl-C's, runs at once."""
    while descriptor not in select.select([descriptor, signalled], [], [])[0]:
        os.read(signalled, READ_MAX)
    return os.read(descriptor, READ_MAX)
