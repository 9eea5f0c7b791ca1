import asyncio
import sys

import filao

QUEUE = "claims.processing"
FILE = sys.argv[1] if len(sys.argv) > 1 else "claims.db"


async def process_claims(broker: filao.Broker) -> None:
    while True:
        message = await broker.receive_from_queue(QUEUE)
        # 1. Too early: acknowledge after the work.
        await message.ack()
        # 2. May fail: try … except, then message.nack().
        await evaluate_claim(message)
        # 3. Pay and ack in one go: message.transaction().
        async with broker.transaction() as tx:
            await pay(tx, message)


# What follows is given: the insurer.

PAYMENTS = """
    CREATE TABLE IF NOT EXISTS payment (
      id INTEGER PRIMARY KEY, message TEXT, claim INTEGER,
      cents INTEGER, paid_by TEXT, attempt INTEGER
    )
"""
PAY = """
    INSERT INTO payment
      (message, claim, cents, paid_by, attempt)
    VALUES (?, ?, ?, 'you', ?)
"""


async def evaluate_claim(message: filao.Message) -> None:
    await asyncio.sleep(message["effort"])
    if message["policy"] == 0:
        raise ValueError("policy 0 is not in the register")


async def pay(
    tx: filao.Transaction,
    message: filao.Message,
) -> None:
    claim, cents = message["claim_id"], message["amount"]
    values = (message.id, claim, cents, message.attempt)
    await tx.execute(PAY, values)


async def main() -> None:
    async with filao.connect(FILE) as broker:
        if not await broker.queues():
            await broker.declare(filao.Queue(QUEUE))
        async with broker.transaction() as tx:
            await tx.execute(PAYMENTS)
        await process_claims(broker)


asyncio.run(main())
