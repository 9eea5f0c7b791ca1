"""Claims to try a system with, from a CSV file.

Whatever is wrong with a file raises a `BadClaimsError` that names the file, the line and what to do, before anything is
started.
"""

import csv
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from io import BytesIO
from typing import BinaryIO, NamedTuple

CLAIMS_MAX = 60_000  # claims of one run: a process sends and two handle some 3,000 in a second on a small machine
LINE_MAX = 64 * 1024  # bytes of a line: no list of claims has longer ones
AMOUNT_MAX = 1_000_000_000  # euros of a claim: more is a typing error
COLUMNS = ("IDpol", "ClaimAmount")
WANTED = ", ".join(COLUMNS)


class Claim(NamedTuple):
    """A claim of a file."""

    number: int
    policy: int
    amount: int
    """Cents."""


TEXTS = {  # by key; the sandbox's page says the same in its own languages
    "no_claims": "{file}: has its columns, but no claim below them",
    "too_many": "{file}: has more than {most} claims, and no more are handled in one run: add --limit {most}",
    "not_csv": "{file}, line {line}: {why}. Is it a CSV file, with commas?",
    "long_line": "{file}, line {line}: is longer than {most} bytes. Is it a CSV file?",
    "encoding": (
        "{file}, line {line}: byte 0x{byte} is not UTF-8. Was it saved as Latin-1 or Windows-1252? Convert it: "
        "iconv -f WINDOWS-1252 -t UTF-8 {file}"
    ),
    "empty": "{file}: is empty, or its first line is. That line must name its columns: {columns}.",
    "no_column": "{file}: has no column {column}. Its first line is {found!r}; it must name {columns}, between commas.",
    "short_row": "{file}, line {line}: has {count} of the columns that the first line names",
    "not_whole": "{file}, line {line}: {column} is {value!r}, and not a whole number",
    "no_number": "{file}, line {line}: {column} is {value!r}; it must be from 0 to {most}",
}


class BadClaimsError(Exception):
    """The file of claims cannot be used. The text says why and what to do; `key` and `values` are for translations."""

    def __init__(self, key: str, **values: str | int) -> None:
        super().__init__(TEXTS[key].format(**values))
        self.key = key
        self.values = values


def from_text(name: str, text: str, limit: int) -> list[Claim]:
    """Read claims from a text that a browser has read from a file; U+FFFD stands for what was not UTF-8."""
    for number, line in enumerate(text.splitlines(), 1):
        if "\ufffd" in line:
            raise BadClaimsError("encoding", file=name, line=number, byte="??")
    return claims_of(name, BytesIO(text.encode(errors="replace")), limit)


def claims_of(name: str, file: BinaryIO, limit: int | None) -> list[Claim]:
    """Read the first `limit` claims of a file with the columns IDpol and ClaimAmount; None: all of them."""
    claims = _read(name, file, limit)
    if not claims:
        raise BadClaimsError("no_claims", file=name)
    return claims


def _read(name: str, file: BinaryIO, limit: int | None) -> list[Claim]:
    rows = csv.reader(_lines(name, file), strict=True)
    try:
        places = _places(name, next(rows, list[str]()))
        claims: list[Claim] = []
        for row in rows:
            if len(claims) == limit:
                break
            if len(claims) == CLAIMS_MAX:
                raise BadClaimsError("too_many", file=name, most=CLAIMS_MAX)
            if row:
                claims.append(_claim(name, rows.line_num, row, places))
    except csv.Error as error:
        raise BadClaimsError("not_csv", file=name, line=rows.line_num, why=str(error)) from error
    return claims


def _lines(name: str, file: BinaryIO) -> Iterator[str]:
    number = 0
    while line := file.readline(LINE_MAX):
        number += 1
        if len(line) == LINE_MAX:
            raise BadClaimsError("long_line", file=name, line=number, most=LINE_MAX)
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadClaimsError("encoding", file=name, line=number, byte=f"{line[error.start]:02x}") from error


def _places(name: str, head: list[str]) -> tuple[int, int]:
    """Return the places of the two columns; others do no harm."""
    names = [column.strip() for column in head]
    if not any(names):
        raise BadClaimsError("empty", file=name, columns=WANTED)
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        found = ", ".join(names)[:120]
        raise BadClaimsError("no_column", file=name, column=", ".join(missing), found=found, columns=WANTED)
    return names.index(COLUMNS[0]), names.index(COLUMNS[1])


def _claim(name: str, line: int, row: list[str], places: tuple[int, int]) -> Claim:
    if len(row) <= max(places):
        raise BadClaimsError("short_row", file=name, line=line, count=len(row))
    policy = _number(name, line, COLUMNS[0], row[places[0]])
    if policy != policy.to_integral_value():
        raise BadClaimsError("not_whole", file=name, line=line, column=COLUMNS[0], value=row[places[0]][:40])
    cents = round(_number(name, line, COLUMNS[1], row[places[1]]) * 100)
    return Claim(number=line - 1, policy=int(policy), amount=cents)


def _number(name: str, line: int, column: str, text: str) -> Decimal:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or not 0 <= number <= AMOUNT_MAX:
        raise BadClaimsError("no_number", file=name, line=line, column=column, value=text[:40], most=AMOUNT_MAX)
    return number
