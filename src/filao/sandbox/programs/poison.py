import asyncio

import filao


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        rules = filao.Queue("claims.processing", max_attempts=3, backoff=filao.Backoff(first=0.1))
        await broker.declare(rules)
        await broker.send_to_queue("claims.processing", {"claim_id": 7, "policy": 0})
        for _ in range(3):
            message = await broker.receive_from_queue("claims.processing")
            await message.nack(reason=f"policy {message['policy']} is not in the register")

        (letter,) = await broker.dead_letters("claims.processing")
        print(letter.reason, [failure.error for failure in letter.history])
        mended = letter.body | {"policy": 12}
        await broker.redrive("claims.processing", ids=[letter.id], body=mended)

        message = await broker.receive_from_queue("claims.processing")
        print("policy", message["policy"])
        await message.ack()


asyncio.run(main())
