"""Whether a WAL still holds what its index says, and what the last look found in it.

SQLite does not read a WAL again before it appends to it. So it goes on appending to one that was cut off or overwritten
in place, as by `cp` of all three files; whoever opens the file next finds what is before the damage, and nothing that
was confirmed after it. So a look compares the last frame of the look before with what is in that place now and, when
others have written since, also the last frame that the index tells.
(https://www.sqlite.org/walformat.html)
"""

import struct
from collections.abc import Callable

from msgspec import Struct

_HEADER = 32  # bytes before the first frame
_FRAME = 24  # bytes of a frame's header, before its page: eight, and then those that are compared
_COMPARED = 16  # bytes: the salts and the checksum, which covers all frames before it
_COPY = 48  # bytes: the index begins with two copies of its header, which differ while it is written
_FORMAT = 3_007_000
_TRIES = 100  # looks while others write, each of whom has restarted the WAL between two reads of ours
_FIELDS = struct.Struct("=I8xBxHI4x2I8s")
_CHECKSUM = struct.Struct(">2I")


class End(Struct, frozen=True):
    """Where a WAL ends: the last frame of what was committed."""

    at: int = 0
    """Its offset in bytes; 0 when there is none."""
    salts: bytes = b""
    """They tell one WAL from the next in the same file."""
    frame: bytes = b""
    """The bytes of it that are compared."""


def end_of(
    index: bytes | None,
    again: Callable[[], bytes | None],
    read: Callable[[int, int, bool], bytes | None],
    seen: End,
    *,
    others_wrote: bool,
) -> End | None:
    """Return where a WAL ends by its index, or what was `seen` where the index does not tell; None when it was damaged.

    Others may write meanwhile: what looks like damage is read `again` until the index has not changed. Only then must
    `read` be sure that it reads the right file.
    """
    is_sure = False
    for _ in range(_TRIES):
        end = _told(index)
        if end is None:
            return seen
        is_same = end.salts == seen.salts
        must = end if others_wrote else seen if is_same else End()
        found = read(_COMPARED, must.at + _FRAME - _COMPARED, is_sure) if must.at else must.frame
        if (found == must.frame and not (is_same and end.at < seen.at)) or (found is None and is_sure):
            return end
        was, index = index, again()
        if index == was and is_sure:
            return None
        is_sure = True
    return seen


def _told(index: bytes | None) -> End | None:
    """Return where an index says that its WAL ends; None while it is being written, or where we may not look."""
    if index is None or len(index) < 2 * _COPY or index[:_COPY] != index[_COPY : 2 * _COPY]:
        return None
    version, is_set, size, frames, one, two, salts = _FIELDS.unpack_from(index)
    if version != _FORMAT or not is_set:
        return None
    page = (size & 0xFE00) + ((size & 1) << 16)
    at = _HEADER + (frames - 1) * (_FRAME + page) if frames else 0
    return End(at, salts, salts + _CHECKSUM.pack(one, two) if frames else b"")
