import asyncio
import subprocess
import sys

import filao

VICTIM = """
import os, signal
import filao.sync
with filao.sync.connect("claims.db") as broker:
    broker.receive_from_queue("claims.processing")
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing"))
        await broker.send_to_queue("claims.processing", {"claim_id": 7})
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", VICTIM], check=False)

        message = await broker.receive_from_queue("claims.processing")
        print("taken over", message["claim_id"], "attempt", message.attempt)
        await message.ack()


asyncio.run(main())
