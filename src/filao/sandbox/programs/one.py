import asyncio

import filao


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing"))
        await broker.send_to_queue("claims.processing", {"claim_id": 7})

        message = await broker.receive_from_queue("claims.processing")
        try:
            print("evaluating", message["claim_id"])
            await message.ack()  # only now is it gone
        except Exception as error:
            await message.nack(reason=error)


asyncio.run(main())
