"""Whatever others write, what reads it ends in our own errors, or in none: rules, envelopes, the register, tables,
URLs.
"""

import struct
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import msgspec
from aiormq.abc import DeliveredMessage
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp.header import ContentHeader

import filao
from filao.engines import engine_for
from filao.engines.rabbitmq import envelope, register, wire
from filao.queue import rules_from_json, rules_to_json
from filao.sandbox.claims import BadClaimsError, claims_of
from filao.urls import checked, shown_url

RUNS = settings(max_examples=300, deadline=None)
KNOWN = [
    *msgspec.json.decode(rules_to_json(filao.Queue("q"))),
    "first",
    "factor",
    "version",
    "rules",
    "x-death",
    "reason",
]
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=8), inner, max_size=6)
    ),
    max_leaves=12,
)
CONTENTS = st.binary(max_size=300) | JSON.map(msgspec.json.encode)


@dataclass
class Came:
    """A message as far as it is read here."""

    body: bytes = b""
    header: ContentHeader | None = None
    delivery_tag: int = 1


@given(CONTENTS)
@RUNS
def test_rules_are_read_or_refused(content) -> None:
    with suppress(filao.ConfigurationError):
        queue = rules_from_json("claims", content.decode(errors="replace"))
        assert rules_from_json("claims", rules_to_json(queue)) == queue


@given(CONTENTS | st.dictionaries(st.text(max_size=9), JSON).map(msgspec.json.encode))
@RUNS
def test_a_register_is_read_as_far_as_it_can_be(content) -> None:
    hold = register._Hold(None, [], {}, [])  # type: ignore[arg-type]  # no channel is needed to read
    register._read(Came(content), hold)  # type: ignore[arg-type]
    for name, page in hold.pages.items():
        assert register._queue(name, page, hold.strange).name == name
    assert hold.messages or hold.strange


def _sized(parts: list[bytes]) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", len(content)) + content


SHORT = st.binary(max_size=255).map(lambda text: bytes([len(text)]) + text)
LONG = st.binary(max_size=40).map(lambda text: struct.pack(">I", len(text)) + text)
FIELDS = st.recursive(
    st.tuples(st.sampled_from([b"S", b"x"]), LONG).map(b"".join)
    | st.tuples(st.sampled_from([bytes([kind]) for kind in range(256)]), st.binary(max_size=9)).map(b"".join),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: b"A" + _sized(items)),
        st.lists(st.tuples(SHORT, inner).map(b"".join), max_size=3).map(lambda entries: b"F" + _sized(entries)),
    ),
    max_leaves=8,
)
TABLES = st.lists(st.tuples(SHORT | st.just(b"\x07x-death"), FIELDS).map(b"".join), max_size=4).map(_sized)


@given(TABLES, SHORT, SHORT, st.binary(min_size=8, max_size=8), CONTENTS)
@RUNS
def test_an_envelope_is_read_and_written_again(table, content_type, name, moment, body) -> None:
    header = ContentHeader()
    flags = 1 << 15 | 1 << 13 | 1 << 7 | 1 << 6
    header.unmarshal(struct.pack(">HHQH", 60, 0, 0, flags) + content_type + table + name + moment)
    properties = header.properties
    message: DeliveredMessage = Came(body, header)  # type: ignore[assignment]
    wire.trouble(properties)
    delivery = envelope.read("claims", message, 1, lambda: "unnamed")
    stored = envelope.stored("claims", message)
    assert delivery.id
    assert msgspec.json.encode(stored)
    envelope.is_expired(properties, 1)
    envelope.expires_at(properties)
    for new in (
        envelope.again(properties, 1),
        envelope.dead(properties, 1, "malformed", "x" * 8_000, 1),
        envelope.redriven(properties, None),
    ):
        assert len(new.marshal()) < 128 * 1024 - 100


@given(
    st.text(max_size=80)
    | st.tuples(
        st.sampled_from(["postgresql", "amqp", "AMQPS", "sqlite", "x"]), st.text("u:@/?#[]%.,\\ é2ap=", max_size=40)
    ).map("://".join)
)
@RUNS
def test_a_url_is_read_or_refused(url) -> None:
    shown_url(url)
    for read in (checked, engine_for):
        with suppress(filao.ConfigurationError):
            read(url)


CSV = st.lists(
    st.lists(st.text(max_size=9) | st.sampled_from(["1", "12.50", "1e99999999", "NaN", '"', "9" * 5_000]), max_size=3)
    .map(",".join).map(str.encode), max_size=4
)  # fmt: skip


@given(st.binary(max_size=300) | CSV.map(lambda rows: b"IDpol,ClaimAmount\n" + b"\n".join(rows)))
@RUNS
def test_a_file_of_claims_is_read_or_refused(content) -> None:
    with suppress(BadClaimsError):
        for claim in claims_of("claims.csv", BytesIO(content), None):
            assert msgspec.json.encode(claim)
