"""Whether a connection over loopback comes from another user of this machine, by Linux's /proc/net/tcp.

Every user of a machine can reach its loopback. But a file of claims is only its owner's, and so is a dashboard without
a token.
"""

import os
import socket
import sys
from pathlib import Path

TABLES = {socket.AF_INET: Path("/proc/net/tcp"), socket.AF_INET6: Path("/proc/net/tcp6")}


def is_of_another_user(client: tuple[str, int], server: tuple[str, int]) -> bool:
    """Return whether the client's end belongs to a user other than ours and root.

    If that is not known, as on macOS or through another network namespace, it counts as ours.
    """
    family = socket.AF_INET6 if ":" in client[0] else socket.AF_INET
    try:
        ends = _end(family, *client), _end(family, *server)
        with TABLES[family].open(encoding="ascii") as table:
            for line in table:
                fields = line.split()
                if (fields[1], fields[2]) == ends:
                    return int(fields[7]) not in (os.getuid(), 0)
    except (OSError, ValueError, IndexError):
        return False
    return False


def _end(family: socket.AddressFamily, host: str, port: int) -> str:
    """Return one end of a connection as the table writes it: in words of the machine's own byte order."""
    packed = socket.inet_pton(family, host)
    words = (packed[first : first + 4] for first in range(0, len(packed), 4))
    written = (word[::-1] if sys.byteorder == "little" else word for word in words)
    return f"{b''.join(written).hex().upper()}:{port:04X}"
