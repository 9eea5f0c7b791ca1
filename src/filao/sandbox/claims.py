"""The claims that the portal sends: made up from a seed, plausible enough to watch; or real ones from a CSV file.

A file is somebody else's: whatever is wrong with it ends in a `BadClaimsError` that names the file, the line and what
to do, before anything is started.
"""

import csv
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from random import Random
from typing import BinaryIO

import msgspec

CLAIMS_MAX = 60_000  # that one run handles: a process sends and two handle some 3,000 in a second on a small machine
LINE_MAX = 64 * 1024  # bytes of a line: more is no list of claims
AMOUNT_MAX = 1_000_000_000  # euros of a claim: more is a slip of the pen
COLUMNS = ("IDpol", "ClaimAmount")

_FIRST_NUMBER = 1001
_KINDS = {  # what may happen, how often of a hundred, and what it costs: the median in euros, and how far it spreads
    "collision": (34, 1_400, 0.8),
    "glass": (22, 420, 0.4),
    "water": (17, 1_150, 0.9),
    "storm": (11, 1_900, 0.9),
    "theft": (8, 2_300, 0.7),
    "hail": (5, 2_600, 0.5),
    "fire": (3, 9_500, 1.1),
}
_TOWNS = (
    *("Angers", "Bordeaux", "Brest", "Clermont-Ferrand", "Dijon", "Grenoble", "Le Havre", "Le Mans", "Lille"),
    *("Limoges", "Lyon", "Marseille", "Metz", "Montpellier", "Nancy", "Nantes", "Nice", "Orléans", "Perpignan"),
    *("Poitiers", "Reims", "Rennes", "Rouen", "Saint-Denis", "Strasbourg", "Toulon", "Toulouse", "Tours"),
)


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """A claim as it is sent: the body of a message."""

    number: int
    policy: int
    amount: int
    """Cents."""
    kind: str = ""
    town: str = ""


class BadClaimsError(Exception):
    """The file of claims cannot be used; the text says why, and what to do."""


def made_up(seed: int, count: int) -> list[Claim]:
    """Make up claims; the same seed makes the same ones."""
    chance = Random(seed)
    kinds = chance.choices(list(_KINDS), [often for often, _, _ in _KINDS.values()], k=count)
    return [
        Claim(
            number=_FIRST_NUMBER + place,
            policy=chance.randrange(1_000_000, 10_000_000),
            amount=_amount(chance, kind),
            kind=kind,
            town=chance.choice(_TOWNS),
        )
        for place, kind in enumerate(kinds)
    ]


def _amount(chance: Random, kind: str) -> int:
    _, median, spread = _KINDS[kind]
    return round(median * 100 * chance.lognormvariate(0, spread))


def from_csv(path: Path, limit: int | None) -> list[Claim]:
    """Read the first `limit` claims of a file with the columns IDpol and ClaimAmount; None: all of them."""
    try:
        with path.open("rb") as file:
            claims = _read(path, file, limit)
    except OSError as error:
        raise BadClaimsError(f"{path}: {error.strerror}. Give a CSV file with {_wanted()}.") from error
    if not claims:
        raise BadClaimsError(f"{path}: has its columns, but no claim below them")
    return claims


def _read(path: Path, file: BinaryIO, limit: int | None) -> list[Claim]:
    rows = csv.reader(_lines(path, file), strict=True)
    try:
        places = _places(path, next(rows, list[str]()))
        claims: list[Claim] = []
        for row in rows:
            if len(claims) == limit:
                break
            if len(claims) == CLAIMS_MAX:
                raise BadClaimsError(
                    f"{path}: has more than {CLAIMS_MAX:,} claims, and no more fit into a minute: add --limit {CLAIMS_MAX}"
                )
            if row:
                claims.append(_claim(path, rows.line_num, row, places))
    except csv.Error as error:
        raise BadClaimsError(f"{path}, line {rows.line_num}: {error}. Is it a CSV file, with commas?") from error
    return claims


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    number = 0
    while line := file.readline(LINE_MAX):
        number += 1
        if len(line) == LINE_MAX:
            raise BadClaimsError(f"{path}, line {number}: is longer than {LINE_MAX:,} bytes. Is it a CSV file?")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            wrong = line[error.start]
            raise BadClaimsError(
                f"{path}, line {number}: byte 0x{wrong:02x} is not UTF-8. Was it saved as Latin-1 or Windows-1252? Convert "
                f"it: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
            ) from error


def _places(path: Path, head: list[str]) -> tuple[int, int]:
    """Return where the two columns stand; more of them do no harm."""
    names = [name.strip() for name in head]
    if not any(names):
        raise BadClaimsError(f"{path}: is empty, or its first line is. That line must name its columns: {_wanted()}.")
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        found = ", ".join(names)
        raise BadClaimsError(
            f"{path}: has no column {' and no '.join(missing)}. Its first line is {found[:120]!r}; it must name "
            f"{_wanted()}, between commas."
        )
    return names.index(COLUMNS[0]), names.index(COLUMNS[1])


def _claim(path: Path, line: int, row: list[str], places: tuple[int, int]) -> Claim:
    if len(row) <= max(places):
        raise BadClaimsError(f"{path}, line {line}: has {len(row)} of the columns that the first line names")
    policy = _number(path, line, COLUMNS[0], row[places[0]])
    if policy != policy.to_integral_value():
        raise BadClaimsError(f"{path}, line {line}: {COLUMNS[0]} is {row[places[0]]!r}, and not a whole number")
    cents = round(_number(path, line, COLUMNS[1], row[places[1]]) * 100)
    return Claim(number=line - 1, policy=int(policy), amount=cents)


def _number(path: Path, line: int, column: str, text: str) -> Decimal:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or not 0 <= number <= AMOUNT_MAX:
        raise BadClaimsError(f"{path}, line {line}: {column} is {text[:40]!r}; it must be from 0 to {AMOUNT_MAX:,}")
    return number


def _wanted() -> str:
    return " and ".join(COLUMNS)
