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

Settled = Literal["ack", "commit", "nack", "reject", "release", "extend"]
Operated = Literal["pause", "resume", "purge", "cancel", "redrive", "delete"]
Verb = Literal["send", "receive", "audit", "stop", "live"] | Settled | Operated
Outcome = Literal["", "done", "duplicate", "refused", "undone", "nothing", "lease_lost", "failed", "killed", "ended"]


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One line.

    A `commit` is an ack inside a transaction; a send is `refused` by a full queue, and `undone` with the transaction
    that it was in. The parent writes when it has a process killed, or `ended` by SIGTERM, and when it stands still.
    """

    process: str
    """A name, and which of its lives this is."""
    task: int = 0
    """A task makes one call after the other."""
    call: Verb
    outcome: Outcome = ""
    """Empty: the call begins."""
    began: float
    ended: float = 0.0
    queue: str = ""
    key: str = ""
    """Which message its sender meant; the message carries it in its body."""
    id: str = ""
    """What the queue called it."""
    group: str = ""
    place: tuple[int, ...] = ()
    """A message's place in its group, as its sender sent it."""
    dedup_key: str = ""
    message_id: str = ""
    delay: float = 0.0
    ttl: float = 0.0
    epoch: int = 0
    """How often the operator had sent the message back when it was delivered: its attempts begin anew each time."""
    attempt: int = 0
    token: int = 0
    """What tells one delivery of a message from the next."""
    seconds: float = 0.0
    """How long a lease is to run, from some moment between `began` and `ended`."""
    limit: int = 0
    """How many messages a receive may bring; each has a line of its own at the end. How many a purge may delete."""
    count: int = 0
    """How many messages a purge or a redrive says that it touched."""
    text: str = ""
    """What an audit found."""


class History:
    """A file of records that many processes append to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, *records: Record) -> None:
        """Append a line with all of them; a process that is killed meanwhile may leave the beginning of one."""
        os.write(self._file, b"\n" + msgspec.json.encode(records))

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def read(path: Path) -> list[Record]:
    """Read what was written, in the order of writing; what was cut off by a kill was not written."""
    decoder = msgspec.json.Decoder(list[Record])
    found: list[Record] = []
    for line in path.read_bytes().splitlines():
        try:
            found += decoder.decode(line)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            continue
    return found
