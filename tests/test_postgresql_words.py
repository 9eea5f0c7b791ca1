"""One rule in two languages: the numbers and words in PostgreSQL's functions are those of the Python beside them."""

import re
from importlib import resources

import pytest

from filao.engine import EDITED, FAILURES, HISTORY_MAX, REASONS, State
from filao.engines.postgresql import schema
from filao.engines.postgresql.control import SLICE
from filao.engines.sqlite.books import COUNTERS, PRIORITIES_MAX
from filao.engines.sqlite.moves import DUE_MAX
from filao.engines.sqlite.processes import LEASES_AT_ONCE

FOLDER = resources.files("filao.engines.postgresql") / "functions"
SQL = "\n".join(
    re.sub(r"--[^\n]*", "", (FOLDER / f"{name}.sql").read_text(encoding="utf-8")) for name in schema.FUNCTIONS
)
LIMITS = [
    (r"m\.failures >= (\d+)", HISTORY_MAX),
    (r"ORDER BY f\.id DESC OFFSET (\d+)", HISTORY_MAX),
    (r"pick_due\(q, seen\.delayed, now, (\d+)\)", DUE_MAX),
    (r"filao\.seen\(q\)\);\s+PERFORM filao\.expire_some\(q, (\d+), now, false", DUE_MAX),
    (r"died boolean, most integer DEFAULT (\d+)", LEASES_AT_ONCE),
    (r"died boolean, most integer DEFAULT (\d+)", SLICE),
    (r"locked CONSTANT integer := (\d+)", PRIORITIES_MAX),
]
"""What a number in the SQL is called in Python."""
OWN = {
    *(11, 16, 20, 32, 64),  # bits of numbers and tokens, digits of an id, a twentieth of the time, powers of a factor
    *(100, 200, 500, 512, 1_000, 20_000, 30_000),  # rows in one go, and what a session keeps in mind
    *(
        2_047,
        160_000,
        600_000,
        86_400_000,
        1_718_184_290,
        1_718_184_291,
        2_147_483_647,
        1_181_314_145_000_000,
    ),  # keys of locks, a version, a day, no priority
}
"""Numbers of the SQL alone: each is named where it stands."""
KINDS = {"k", "m", "ack", "nack", "release", "extend", "extended", "split", "full", "_", "place", "halted"}
"""What the calls in `verbs.py` are told apart by, and what they answer."""


def _words() -> set[str]:
    return set(re.findall(r"'([a-z_]+)'", SQL)) | {word.rstrip(":") for word in re.findall(r"'([a-z_]+:)'", SQL)}


@pytest.mark.parametrize(("pattern", "value"), LIMITS)
def test_a_limit_in_the_sql_is_that_of_the_python(pattern: str, value: int) -> None:
    assert {int(found) for found in re.findall(pattern, SQL)} == {value}


def test_every_other_number_in_the_sql_is_accounted_for() -> None:
    plain = re.sub(r"'[^']*'", "''", SQL)
    numbers = {int(found.replace("_", "")) for found in re.findall(r"(?<![\w.$])(\d[\d_]*)(?:\.0)?(?!\w)", plain)}
    assert {number for number in numbers if number > 9} == OWN | {value for _, value in LIMITS}


def test_every_word_in_the_sql_is_one_of_the_python() -> None:
    named = set(re.findall(r"FUNCTION filao\.(\w+)", SQL))
    settings = {
        "filao",
        "filao_",
        "advisory",
        "application_name",
        "transaction_isolation",
        "clock",
        "isolated",
        "server_version_num",
        "yes",  # of the setting filao.moves
        "database",
    }
    events = {"called", "redriven"}
    ours = {str(state) for state in State} | set(COUNTERS) | set(REASONS) | set(FAILURES) | {EDITED}
    assert _words() - ours - KINDS - events - settings - named == set()


def test_the_sql_counts_what_the_python_counts() -> None:
    assert set(COUNTERS) - _words() == set()
    assert {str(state) for state in State} - _words() == set()
