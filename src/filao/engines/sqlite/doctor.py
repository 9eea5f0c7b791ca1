"""What the doctor examines in a Filao file, and what an operator should know of it."""

import shutil
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from filao.engine import Finding
from filao.engines.sqlite import files, own, scrutiny
from filao.engines.sqlite.books import STATES, Books, read_rules, tokens
from filao.engines.sqlite.clock import JUMP
from filao.engines.sqlite.hold import Hold
from filao.engines.sqlite.mounts import file_system
from filao.engines.sqlite.stats import stats
from filao.errors import EngineError
from filao.overview import DEED, deed_of, deeds_finding, miscounted, queue_finding
from filao.printable import some
from filao.process import process_finding

_MISCOUNTED = " UNION ALL ".join(
    f"""
    SELECT name, '{name}', {name},
           (SELECT count(*) FROM filao_message WHERE queue = filao_queue.id AND state = {number}) AS there
    FROM filao_queue
    WHERE {name} <> there
    """
    for number, name in STATES.items()
)
_ROOM_NOTABLE = 64 * 1024 * 1024  # bytes: with less left on its disk, a file may find no room for its WAL
ROOM_LEAST = 2_000_000  # bytes: with less of it left, a disk is full for SQLite
_MISCOUNTED_REASONS = """
    SELECT name, 'dead: ' || reason, filao_reason.dead, (
        SELECT count(*) FROM filao_message
        WHERE queue = filao_queue.id AND state = 6 AND coalesce(reason, '') = filao_reason.reason
    ) AS there
    FROM filao_reason
    JOIN filao_queue ON filao_queue.id = filao_reason.queue
    WHERE filao_reason.dead <> there
"""


def examine(books: Books, hold: Hold) -> list[Finding]:
    """Examine everything, from the library to the last page."""
    return [
        _version(),
        *([] if hold.path == files.MEMORY else _files(hold.path)),
        *_modes(books.db),
        _clock(books, hold),
        _tables(books.db),
        *_unreadable(books.db),
        *_queues(books),
        *_processes(books, hold),
        *_kept(books.db),
        _integrity(books.db),
    ]


def _version() -> Finding:
    version = sqlite3.sqlite_version_info
    if wal_reset_fixed(version):
        return Finding("SQLite", "ok", sqlite3.sqlite_version)
    return Finding(
        "SQLite",
        "note",
        f"{sqlite3.sqlite_version} has the WAL-reset bug (fixed in 3.51.3, 3.50.7, 3.44.6). Filao's own processes are "
        "safe, because they take turns to commit and to checkpoint; other programs that write to this file are not.",
    )


def wal_reset_fixed(version: tuple[int, ...]) -> bool:
    """Return whether this SQLite is free of the WAL-reset bug.

    3.52.0 was withdrawn. (https://www.sqlite.org/wal.html)
    """
    if version[:2] in ((3, 44), (3, 50), (3, 51)):
        return version[2] >= {44: 6, 50: 7, 51: 3}[version[1]]
    return version[:2] >= (3, 52)


def _files(path: Path) -> Iterator[Finding]:
    kind = file_system(path)
    yield Finding("file system", "ok" if kind else "note", kind or "this system does not tell its type")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield Finding("permissions", "warning", f"{mode:04o}: others may read the messages; chmod 600 {path}")
    else:
        yield Finding("permissions", "ok", f"{mode:04o}")
    size = own.wal_size(path)
    if size > own.WAL_NOTABLE:
        yield Finding("WAL", "warning", own.why_wal_grows(path))
    else:
        yield Finding("WAL", "ok", f"{size:,} bytes")
    yield _disk(path)


def _disk(path: Path) -> Finding:
    free = shutil.disk_usage(path.parent).free
    if free >= _ROOM_NOTABLE:
        return Finding("disk", "ok", f"{free / 1024**2:,.0f} MiB are free")
    if free >= ROOM_LEAST:
        return Finding("disk", "warning", f"only {free / 1024**2:,.1f} MiB are free: make room before it is full")
    text = f"it is full: {some(free, 'byte', ('is', 'are'))} free. Until there is room, sends and settles fail"
    return Finding("disk", "error", text)


def _modes(db: sqlite3.Connection) -> Iterator[Finding]:
    journal = db.execute("PRAGMA journal_mode").fetchone()[0]
    yield Finding("journal mode", "ok" if journal in ("wal", "memory") else "error", journal)
    vacuum = db.execute("PRAGMA auto_vacuum").fetchone()[0]
    free = db.execute("PRAGMA freelist_count").fetchone()[0]
    if vacuum == 2:
        yield Finding("free pages", "ok", f"{free:,}, given back when the queue is idle")
    else:
        yield Finding(
            "free pages",
            "note",
            f"{free:,}; this file was created without auto_vacuum=INCREMENTAL, so a backlog's space is reused but not "
            f"given back. To change that: PRAGMA auto_vacuum=INCREMENTAL; VACUUM",
        )


def _clock(books: Books, hold: Hold) -> Finding:
    ahead = hold.clock.ahead(books.db)
    if abs(ahead) * 1000 <= JUMP:
        return Finding("clock", "ok", "the file's time is the wall clock's")
    text = (
        f"the wall clock is {ahead:+,.1f} s from the file's time, which follows it by a twentieth of the time that "
        "passes"
    )
    return Finding("clock", "note", text)


def _tables(db: sqlite3.Connection) -> Finding:
    wrong = "; ".join(scrutiny.differences(db))
    return Finding("tables", "error" if wrong else "ok", wrong or f"of version {files.schema_version(db)}")


def _unreadable(db: sqlite3.Connection) -> Iterator[Finding]:
    """Yield what no Filao wrote: unreadable rules and headers, messages of no queue, and wrong counters."""
    for name, rules in db.execute("SELECT name, rules FROM filao_queue").fetchall():
        try:
            read_rules(name, rules)
        except EngineError as error:
            yield Finding(f"queue {name!r}", "error", str(error))
    headers = db.execute(
        "SELECT count(*) FROM filao_message WHERE headers IS NOT NULL AND NOT json_valid(headers)"
    ).fetchone()[0]
    if headers:
        have = some(headers, "message", ("has", "have"))
        yield Finding("headers", "error", f"{have} headers that are no JSON: another program wrote them")
    strays = db.execute(
        "SELECT count(*) FROM filao_message WHERE queue NOT IN (SELECT id FROM filao_queue)"
    ).fetchone()[0]
    if strays:
        yield Finding("messages", "error", some(strays, "message", ("is of no queue", "are of no queue")))
    for name, state, counted, there in (*db.execute(_MISCOUNTED), *db.execute(_MISCOUNTED_REASONS)):
        yield Finding(f"queue {name!r}", "error", miscounted(counted, state, there))


def _queues(books: Books) -> Iterator[Finding]:
    for queue in stats(books):
        (run_out,) = books.db.execute(
            """
            SELECT count(*)
            FROM filao_message INDEXED BY filao_leased
            WHERE queue = (SELECT id FROM filao_queue WHERE name = ?) AND state = 4 AND at <= ?
            """,
            (queue.name, books.now),
        ).fetchone()
        yield queue_finding(queue, run_out)


def _processes(books: Books, hold: Hold) -> Iterator[Finding]:
    found = books.db.execute("SELECT id, bell, name, state, reported_at FROM filao_process ORDER BY id").fetchall()
    dead = {process for process, _ in hold.belfry.dead((process, bell) for process, bell, *_ in found)}
    for process, bell, name, state, reported_at in found:
        if process in dead:
            text = f"{name} died; the next waiting consumer takes its leases over"
            yield Finding("processes", "note", text)
        elif hold.belfry.misses(bell):
            text = f"{name} shows no sign of life: it died, or stops because the folder beside the file was lost"
            yield Finding("processes", "warning", text)
        else:
            (held,) = books.db.execute(
                "SELECT count(*) FROM filao_message INDEXED BY filao_leased WHERE state = 4 AND token BETWEEN ? AND ?",
                tokens(process),
            ).fetchone()
            yield process_finding(name, held, state, (books.now - reported_at) / 1000)


def _kept(db: sqlite3.Connection) -> Iterator[Finding]:
    """Yield what is kept of the history of messages, and of what operators did."""
    (events,) = db.execute("SELECT count(*) FROM filao_event").fetchone()
    if events:
        yield Finding("history", "ok", f"{some(events, 'event')} of messages, of queues declared with history=True")
    (deeds,) = db.execute("SELECT count(*) FROM filao_audit").fetchone()
    unended = db.execute(f"SELECT {DEED} FROM filao_audit WHERE ended_at IS NULL ORDER BY id DESC").fetchall()
    yield from deeds_finding(deeds, [deed_of(row) for row in unended])


def _integrity(db: sqlite3.Connection) -> Finding:
    verdict = "; ".join(row[0] for row in db.execute("PRAGMA integrity_check(5)"))
    return Finding("integrity", "ok" if verdict == "ok" else "error", verdict)
