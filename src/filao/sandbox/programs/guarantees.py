import asyncio

import filao


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing"))
        await broker.send_many("claims.processing", [{"claim_id": number} for number in (1, 2, 3)])
        async with broker.transaction() as tx:
            await tx.execute("CREATE TABLE payment (claim INTEGER)")

        # At most once: acknowledged before the work. If we died now, the claim would be lost.
        message = await broker.receive_from_queue("claims.processing", guarantee="at-most-once")

        # At least once: acknowledged after the work. If we died in between, it would be done again.
        message = await broker.receive_from_queue("claims.processing")
        await message.ack()

        # Exactly once: the work and the acknowledgement commit together, or not at all.
        message = await broker.receive_from_queue("claims.processing")
        async with message.transaction() as tx:
            await tx.execute("INSERT INTO payment VALUES (?)", (message["claim_id"],))


asyncio.run(main())
