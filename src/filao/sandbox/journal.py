"""What the processes write down, each in its own file and past the broker: the evidence for the ledger.

A record is one line, written by one system call, so that a process can be killed between any two and leaves whole
lines. Times are those of the machine's monotonic clock, which all its processes share.
"""

import os
import time
from pathlib import Path
from typing import Literal

import msgspec

PORTAL, PRINTER = 0, -1  # who writes; consumers are 1, 2, 3 ...
CHUNK = 4 * 1024 * 1024  # bytes that one look at a journal takes

What = Literal[
    "started",  # the process is ready
    "sent",  # the portal has the receipt: from here on the claim must not be lost
    "unsent",  # the queue refused it, and the customer was told
    "received",  # a consumer holds the claim
    "extended",  # its lease was extended
    "lost",  # its lease could not be extended any more: another consumer has the claim
    "paying",  # the effect is written, in a transaction that is not yet committed
    "handled",  # the effect: it was evaluated, and the decision stands
    "acked",  # the acknowledgement returned
    "nacked",  # it failed, and was given back
    "failed",  # it failed, and was not given back: it was received at most once
    "released",  # it was given back as it came
    "refused",  # it was settled too late: the lease was lost
    "troubled",  # the storage failed
    "halted",  # it stands still where it was told to, and waits for what will happen to it
]


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a journal."""

    at: float
    who: int
    what: What
    message: str = ""
    claim: int = 0
    attempt: int = 0
    pid: int = 0
    note: str = ""
    until: float = 0.0
    """When the lease ends."""
    row: str = ""
    """The row of the message on the disk just after that, as JSON; empty: there is none."""


class Journal:
    """The journal of one process, open for writing."""

    def __init__(self, path: Path, who: int) -> None:
        self._who = who
        self._encode = msgspec.json.Encoder().encode
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(
        self,
        what: What,
        *,
        message: str = "",
        claim: int = 0,
        attempt: int = 0,
        note: str = "",
        until: float = 0.0,
        row: str = "",
    ) -> None:
        """Write down what this process did."""
        now = time.monotonic()
        record = Record(now, self._who, what, message, claim, attempt, os.getpid(), note, until, row)
        os.write(self._file, self._encode(record) + b"\n")


class Tail:
    """A journal, open for reading what is added to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self._decode = msgspec.json.Decoder(Record).decode

    def read(self) -> list[Record]:
        """Return the records since the last look; a line without its end is left for the next."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._place)
                chunk = file.read(CHUNK)
        except FileNotFoundError:
            return []
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._place += len(whole)
        return [self._decode(line) for line in whole.splitlines()]


def journal_of(folder: Path, who: int) -> Path:
    """Return the file of a process's journal."""
    name = {PORTAL: "portal", PRINTER: "printer"}.get(who, f"consumer-{who}")
    return folder / f"{name}.journal"
