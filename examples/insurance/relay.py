"""The relay: `python -m examples.insurance.relay`. It sends what the portal and the policy service have committed."""

import asyncio
import sys

import filao
from examples.insurance.database import connect
from examples.insurance.settings import BUSINESS, QUEUES, claims, documents, outbox


async def main() -> None:
    """Relay until told to stop."""
    async with filao.connect(QUEUES) as broker:
        await broker.declare(claims, documents)
        sys.stderr.write("relaying\n")
        await filao.Relay(outbox, lambda: connect(BUSINESS), broker, poll=0.05).run()


if __name__ == "__main__":
    asyncio.run(main())
