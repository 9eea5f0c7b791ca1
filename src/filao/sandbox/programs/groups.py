import asyncio

import filao


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing"))
        for step in ("opened", "inspected", "paid"):
            await broker.send_to_queue("claims.processing", {"step": step}, group="policy-12")

        first = await broker.receive_from_queue("claims.processing")
        print(first["step"])
        print(await broker.receive_from_queue("claims.processing", wait=0))  # None: the group waits for its head
        await first.ack()
        second = await broker.receive_from_queue("claims.processing")
        print(second["step"])
        await second.ack()


asyncio.run(main())
