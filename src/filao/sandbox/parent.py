"""What a process of the sandbox hears from its parent: lines on its standard input, and their end.

At the end it finishes: the parent has closed the pipe, or is dead.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator

LINE_MAX = 1024 * 1024  # bytes of a line: no order is longer


async def lines_of_parent() -> AsyncGenerator[bytes]:
    """Yield each line of standard input, and return when it ends."""
    reader = asyncio.StreamReader(limit=LINE_MAX)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    try:
        async for line in reader:
            yield line
    finally:
        transport.close()
