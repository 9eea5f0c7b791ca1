"""What is written down while Filao is tortured: one line when a process begins a call, one when the call has ended.

Lines that belong together are written with one `os.write` to a file opened for appending, so that a SIGKILL leaves
whole lines only. Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share: `began` was taken before
the call and `ended` after it returned, so that whatever the call did happened in between.
"""

import os
import time
from pathlib import Path
from typing import Literal

import msgspec

now = time.monotonic

Verb = Literal["send", "receive", "ack", "commit", "nack", "reject", "release", "extend", "live"]
Outcome = Literal["", "done", "duplicate", "nothing", "lease_lost", "failed", "killed"]


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One line. A `commit` is an ack inside a transaction; the one end of `live` is to be killed, as the parent saw it."""

    process: str
    """A name, and which of its lives this is."""
    task: int = 0
    """A task makes one call after the other."""
    call: Verb
    outcome: Outcome = ""
    """Empty: the call begins."""
    began: float
    ended: float = 0.0
    key: str = ""
    """Which message its sender meant; the message carries it in its body."""
    id: str = ""
    """What the queue called it."""
    group: str = ""
    place: tuple[int, ...] = ()
    """A message's place in its group, as its sender sent it."""
    dedup_key: str = ""
    attempt: int = 0
    token: int = 0
    """What tells one delivery of a message from the next."""
    seconds: float = 0.0
    """How long a lease is to run, from some moment between `began` and `ended`."""
    limit: int = 0
    """How many messages a receive may bring; each has a line of its own at the end."""


class History:
    """A file of records that many processes append to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, *records: Record) -> None:
        """Append lines, all or none."""
        os.write(self._file, b"".join(msgspec.json.encode(record) + b"\n" for record in records))

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def read(path: Path) -> list[Record]:
    """Read what was written, in the order of writing."""
    decoder = msgspec.json.Decoder(Record)
    return [decoder.decode(line) for line in path.read_bytes().splitlines()]
