import asyncio
import sys

import filao

FILE = sys.argv[1] if len(sys.argv) > 1 else "claims.db"


async def process_claims(broker: filao.Broker) -> None:
    while True:
        message = await broker.receive_from_queue("claims.processing")
        # 1. Too early: acknowledge after the work.
        await message.ack()
        # 2. This may fail: try … except, then message.nack(reason=error).
        await evaluate_claim(message)
        # 3. message.transaction() pays and acknowledges in one go.
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
    INSERT INTO payment (message, claim, cents, paid_by, attempt)
    VALUES (?, ?, ?, 'you', ?)
"""


async def evaluate_claim(message: filao.Message) -> None:
    await asyncio.sleep(message["effort"])
    if message["policy"] == 0:
        raise ValueError("policy 0 is not in the register")


async def pay(tx: filao.Transaction, message: filao.Message) -> None:
    claim, cents = message["claim_id"], message["amount"]
    await tx.execute(PAY, (message.id, claim, cents, message.attempt))


async def main() -> None:
    async with filao.connect(FILE) as broker:
        if not await broker.queues():
            await broker.declare(filao.Queue("claims.processing"))
        async with broker.transaction() as tx:
            await tx.execute(PAYMENTS)
        await process_claims(broker)


asyncio.run(main())
