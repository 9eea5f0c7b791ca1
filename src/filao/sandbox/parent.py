"""How a process of the demo learns that it may go home: the one that started it closes the pipe, or is dead."""

import asyncio
import os
import sys


async def parent_leaves() -> None:
    """Return when standard input ends."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pipe = sys.stdin.fileno()

    def read() -> None:
        if not os.read(pipe, 1024):
            loop.remove_reader(pipe)
            ended.set()

    loop.add_reader(pipe, read)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pipe)
