"""huey on SQLite, flushing every commit; two worker processes. It deletes a job as it hands it out."""

import huey

from bench.jobs import tally

COMMAND = ["huey.bin.huey_consumer", "bench.jobs.huey_app.queue", "-w", "2", "-k", "process", "-q"]

queue = huey.SqliteHuey(filename=str(tally.FOLDER / "huey.db"), fsync=True, results=False)


@queue.task()  # type: ignore[untyped-decorator]  # it has no types
def noop(number: int) -> None:
    tally.count()


async def enqueue(count: int) -> None:
    for number in range(count):
        noop(number)
