"""What nobody waits for: what is expired, forgotten or free, in slices that cost others little."""

from filao.engines.sqlite import moves, operators, processes
from filao.engines.sqlite.books import Books

FREE_PAGES_KEPT = 256  # 1 MiB is not worth the work of giving it back
FREE_PAGES_BUSY = 2_560  # 10 MiB that stay free under traffic
TIDY_PAGES = 500  # pages given back to the file system in one turn: a few milliseconds of the write lock
TIDY_EXPIRED = 500  # messages that outlived their ttl and are ended in one turn: some 10 ms of the write lock


def tidy(books: Books, *, idle: bool) -> bool:
    """Do a slice; return whether there is more to do.

    Under traffic as many pages stay free as are in use, because they are about to be used again.
    """
    more = processes.forget_keys(books) | processes.forget_events(books)
    for queue in operators.outlived(books)[:1]:
        row = books.queue(queue)
        more |= row is not None and bool(moves.let_expire(books, row, TIDY_EXPIRED))
    free, pages = (books.db.execute(f"PRAGMA {name}_count").fetchone()[0] for name in ("freelist", "page"))
    if free > (FREE_PAGES_KEPT if idle else max(FREE_PAGES_BUSY, pages - free)):
        books.db.execute(f"PRAGMA incremental_vacuum({TIDY_PAGES})").fetchall()
        more |= books.db.execute("PRAGMA freelist_count").fetchone()[0] < free
    return more
