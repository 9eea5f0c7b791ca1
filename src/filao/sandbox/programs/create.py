import asyncio

import filao


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing", lease=30, max_attempts=5))
        print(await broker.stats("claims.processing"))


asyncio.run(main())
