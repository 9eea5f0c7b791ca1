"""Processes that receive, and what is cleared up behind them. `postgresql/functions/processes.sql` is the same."""

from filao.engines.sqlite.books import Books, tokens
from filao.engines.sqlite.operators import queues
from filao.engines.sqlite.receive import lose_all
from filao.engines.sqlite.settle import release


def bury(books: Books, process: int) -> None:
    """Take over the leases of a process that died, and strike it off."""
    for queue in queues(books.db):
        row = books.queue(queue.name)
        if row is not None and row.count["leased"]:
            lose_all(books, row, "token BETWEEN ? AND ?", tokens(process), "crashed")
    _strike_off(books, process)


def _strike_off(books: Books, process: int) -> None:
    books.db.execute("DELETE FROM filao_waiting WHERE process = ?", (process,))
    books.db.execute("DELETE FROM filao_process WHERE id = ?", (process,))


def resign(books: Books, process: int, limit: int) -> None:
    """Give back the leases of a process that leaves, the attempts unused, and strike it off."""
    for queue in queues(books.db):
        row = books.queue(queue.name)
        if row is None or not row.count["leased"]:
            continue
        for entry in books.entries(
            "INDEXED BY filao_leased WHERE queue = ? AND state = 4 AND token BETWEEN ? AND ? LIMIT ?",
            (row.id, *tokens(process), limit),
        ):
            release(books, row, entry)
    _strike_off(books, process)
