"""The portal, a process of its own: it sends claims, and writes each receipt down once the queue has confirmed it.

It ends when all are sent, or when the process that started it closes its standard input or dies.
"""

import asyncio
import sys
from collections import deque
from pathlib import Path

import msgspec

import filao
from filao.sandbox.claims import Claim
from filao.sandbox.journal import PORTAL, Journal, journal_of
from filao.sandbox.orders import QUEUE, PortalOrders, due
from filao.sandbox.parent import parent_leaves

TICK = 0.02  # seconds: what is due meanwhile is sent at once, and shares a commit


async def send_all(orders: PortalOrders) -> None:
    """Send every claim when it is due."""
    waiting = deque(msgspec.json.decode(Path(orders.claims).read_bytes(), type=list[Claim]))
    total = len(waiting)
    journal = Journal(journal_of(Path(orders.journals), PORTAL), PORTAL)
    loop = asyncio.get_running_loop()
    async with filao.connect(orders.file) as broker:
        journal.write("started")
        began = loop.time()
        while waiting:
            sent_until = round(total * due((loop.time() - began) / orders.sending))
            async with asyncio.TaskGroup() as sends:
                while total - len(waiting) < sent_until:
                    sends.create_task(_send(broker, journal, waiting.popleft()))
            await asyncio.sleep(TICK)


async def _send(broker: filao.Broker, journal: Journal, claim: Claim) -> None:
    receipt = await broker.send_to_queue(QUEUE, claim)
    journal.write("sent", message=receipt.id, claim=claim.number)


async def main() -> None:
    """Send until all is sent or nobody is there to see it."""
    sending = asyncio.create_task(send_all(msgspec.json.decode(sys.argv[1], type=PortalOrders)))
    leaving = asyncio.create_task(parent_leaves())
    await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if sending.done():
        sending.result()
    else:
        sending.cancel()
        await asyncio.wait((sending,))


if __name__ == "__main__":
    asyncio.run(main())
