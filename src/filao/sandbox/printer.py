"""The generator of documents, a process of its own: it consumes the second queue and writes a letter per decision."""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

import filao
from filao.sandbox.journal import Journal, journal_of
from filao.sandbox.orders import DOCUMENTS, Post, number_in
from filao.sandbox.parent import lines_of_parent

PRINTING = 0.8  # seconds for a letter, at normal speed
LETTER = """\
Claim {claim_id}

We have decided on your claim. {cents:.2f} euros are on their way to you.

Assurances Filao
"""


async def print_letters(broker: filao.Broker, post: Post) -> None:
    """Write letters for ever. A letter that is written twice is the same file."""
    journal = Journal(journal_of(Path(post.journals), post.number), post.number)
    async for message in broker.consume(DOCUMENTS):
        claim, cents = number_in(message.body, "claim_id"), number_in(message.body, "cents")
        with suppress(OSError):
            journal.write("received", message=message.id, claim=claim, attempt=message.attempt)
        await asyncio.sleep(PRINTING / post.speed)
        letter = Path(post.journals) / f"letter-{claim}.txt"
        letter.write_text(LETTER.format(claim_id=claim, cents=cents / 100), encoding="utf-8")
        await message.ack()
        with suppress(OSError):
            journal.write("handled", message=message.id, claim=claim, attempt=message.attempt)


async def main() -> None:
    """Print until the parent leaves."""
    post = msgspec.json.decode(sys.argv[1], type=Post)
    async with filao.connect(post.file) as broker:
        printing = asyncio.create_task(print_letters(broker, post))
        async for _ in lines_of_parent():
            pass
        printing.cancel()
        await asyncio.wait((printing,))


if __name__ == "__main__":
    asyncio.run(main())
