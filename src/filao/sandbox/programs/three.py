import asyncio

import filao


async def worker(name: str, broker: filao.Broker) -> None:
    while message := await broker.receive_from_queue("claims.processing", wait=1):
        await asyncio.sleep(0.05)
        print(name, "evaluated", message["claim_id"])
        await message.ack()


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing"))
        await broker.send_many("claims.processing", [{"claim_id": number} for number in range(24)])
        await asyncio.gather(*(worker(f"worker {number}", broker) for number in (1, 2, 3)))


asyncio.run(main())
