"""The insurer's own database: claims, payments, letters to customers, policies.

Every function takes a connection and works in the transaction that it holds; `Database` runs them in a thread, each
call one transaction.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from examples.insurance.settings import inbox, outbox

R = TypeVar("R")

SCHEMA = """
    CREATE TABLE IF NOT EXISTS claim (
        id        INTEGER PRIMARY KEY,
        reference TEXT NOT NULL,         -- the customer's own, so that a repeated request makes no second claim
        policy    INTEGER NOT NULL,
        type      TEXT NOT NULL,
        amount    INTEGER NOT NULL,      -- cents
        state     TEXT NOT NULL,         -- submitted, paid or refused
        UNIQUE (policy, reference)       -- another's reference is no reference of mine
    );
    CREATE TABLE IF NOT EXISTS payment (id INTEGER PRIMARY KEY, claim INTEGER NOT NULL, amount INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS letter (id INTEGER PRIMARY KEY, claim INTEGER NOT NULL, text TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS policy (id INTEGER PRIMARY KEY, holder TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim as it stands."""

    id: int
    reference: str
    policy: int
    type: str
    amount: int
    state: str


class ReferenceUsedError(Exception):
    """The policy has a claim with this reference that says something else."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the database, and create what is not there."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA.split(";"):
        connection.execute(statement)
    outbox.create(connection)
    inbox.create(connection)
    connection.execute("COMMIT")
    return connection


def insert_claim(connection: sqlite3.Connection, data: dict[str, Any]) -> tuple[Claim, bool]:
    """Store a claim, and say whether it is new: the policy may have one with the same reference, which must say the
    same.
    """
    row = (data["reference"], data["policy"], data["type"], data["amount"])
    new = connection.execute(
        "INSERT INTO claim (reference, policy, type, amount, state) VALUES (?, ?, ?, ?, "
        "'submitted') ON CONFLICT DO NOTHING",
        row,
    ).rowcount
    claim = Claim(*connection.execute("SELECT * FROM claim WHERE reference = ? AND policy = ?", row[:2]).fetchone())
    if (claim.reference, claim.policy, claim.type, claim.amount) != row:
        raise ReferenceUsedError(claim.reference)
    return claim, bool(new)


def get_claim(connection: sqlite3.Connection, claim_id: int) -> Claim | None:
    """Return a claim; None when there is none of that id."""
    found = connection.execute("SELECT * FROM claim WHERE id = ?", (claim_id,)).fetchone()
    return Claim(*found) if found else None


def settle_claim(connection: sqlite3.Connection, claim: Claim, payout: int) -> None:
    """Pay a claim, or refuse it when there is nothing to pay."""
    if payout:
        connection.execute("INSERT INTO payment (claim, amount) VALUES (?, ?)", (claim.id, payout))
    connection.execute("UPDATE claim SET state = ? WHERE id = ?", ("paid" if payout else "refused", claim.id))


def write_letter(connection: sqlite3.Connection, claim: Claim, text: str) -> None:
    """Tell the customer."""
    connection.execute("INSERT INTO letter (claim, text) VALUES (?, ?)", (claim.id, text))


def insert_policy(connection: sqlite3.Connection, holder: str) -> int:
    """Store a policy and return its number."""
    number = connection.execute("INSERT INTO policy (holder) VALUES (?)", (holder,)).lastrowid
    assert number is not None
    return number


class Database:
    """The functions above for coroutines: `await db.do(get_claim, 7)`."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._path = path
        self._connection: sqlite3.Connection | None = None

    async def do(self, function: Callable[..., R], *arguments: Any) -> R:
        """Run a function in one transaction."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, function, *arguments)

    async def insert_claim(self, data: dict[str, Any]) -> Claim:
        """Store a claim."""
        return (await self.do(insert_claim, data))[0]

    async def get_claim(self, claim_id: int) -> Claim:
        """Return a claim that is there."""
        claim = await self.do(get_claim, claim_id)
        if claim is None:
            raise LookupError(f"there is no claim {claim_id}")
        return claim

    def _do(self, function: Callable[..., R], *arguments: Any) -> R:
        if self._connection is None:
            self._connection = connect(self._path)
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = function(self._connection, *arguments)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        return result
