import asyncio

import filao


async def main() -> None:
    async with filao.connect("claims.db") as broker, filao.connect("claims.db") as other:
        await broker.declare(filao.Queue("claims.processing", lease=0.2))
        await broker.send_to_queue("claims.processing", {"claim_id": 7})

        sleeper = await broker.receive_from_queue("claims.processing")
        owner = await other.receive_from_queue("claims.processing")  # comes when the lease has run out
        try:
            await sleeper.ack()
        except filao.LeaseLost as error:
            print("refused:", error)
        await owner.ack()


asyncio.run(main())
