"""What strangers write, and what reads it. A target reads bytes of any kind, and may raise nothing but what is ours.

Anything else that it raises, a hang and a gigabyte of memory are findings.
"""

import asyncio
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
from aiormq.abc import DeliveredMessage
from pamqp.header import ContentHeader

import filao
from filao.codec import codec_for, decode_headers, is_too_deep, seen_body, seen_headers
from filao.engines import engine_for
from filao.engines.rabbitmq import envelope, register, wire
from filao.printable import printable, printable_json
from filao.queue import rules_from_json, rules_to_json
from filao.sandbox import claims
from filao.sandbox.room import Room, RoomError
from filao.sandbox.visits import Visit
from filao.sandbox.web.events import VERBS, Asked, handle
from filao.urls import checked, shown_url

Target = Callable[[bytes], None]
SCHEMES = ("", "postgresql://", "amqp://", "AMQPS://", "sqlite://", "x://")
PURE = ("go", "restore", "predict", "submit_file", "kill", "pause", "resume", "slow", "fail")
"""Events of the sandbox that start no process in a room without a queue."""


class Body(msgspec.Struct):
    """What a typed queue carries."""

    claim_id: int
    town: str = ""


@dataclass
class Came:
    """A message as far as it is read here."""

    body: bytes = b""
    header: ContentHeader | None = None
    delivery_tag: int = 1


def rules(content: bytes) -> None:
    """Read the rules of a queue, as they are stored."""
    with suppress(filao.ConfigurationError):
        queue = rules_from_json("claims", content.decode(errors="replace"))
        assert rules_from_json("claims", rules_to_json(queue)) == queue


def the_register(content: bytes) -> None:
    """Read the message that holds all rules on RabbitMQ."""
    hold = register._Hold(None, [], {}, [])  # type: ignore[arg-type]  # no channel is needed to read
    register._read(Came(content), hold)  # type: ignore[arg-type]
    for name, page in hold.pages.items():
        assert register._queue(name, page, hold.strange).name == name
    assert hold.messages or hold.strange


def the_envelope(content: bytes) -> None:
    """Read and write again a foreign AMQP message: a content type, an id, a time, headers, then the body."""
    cut = content.find(b"\xff\xfe")
    table, body = (content, b"") if cut < 0 else (content[:cut], content[cut + 2 :])
    texts, table = table[:16], table[16:]
    short = [bytes([len(text)]) + text for text in (texts[:8], texts[8:])]
    header = ContentHeader()
    flags = 1 << 15 | 1 << 13 | 1 << 7 | 1 << 6
    moment = texts[:8].ljust(8, b"\0")
    parts = short[0] + struct.pack(">I", len(table)) + table + short[1] + moment
    header.unmarshal(struct.pack(">HHQH", 60, 0, 0, flags) + parts)
    properties = header.properties
    message: DeliveredMessage = Came(body, header)  # type: ignore[assignment]
    wire.trouble(properties)
    assert envelope.read("claims", message, 1, lambda: "unnamed").id
    assert msgspec.json.encode(envelope.stored("claims", message))
    envelope.is_expired(properties, 1)
    for new in (
        envelope.again(properties, 1),
        envelope.dead(properties, 1, "malformed", "x" * 8_000, 1),
        envelope.redriven(properties, None),
    ):
        assert len(new.marshal()) < 128 * 1024 - 100  # one frame


def url(content: bytes) -> None:
    """Read a URL, from a setting."""
    text = SCHEMES[content[0] % len(SCHEMES)] + content[1:].decode(errors="surrogateescape") if content else ""
    shown_url(text)
    for read in (checked, engine_for):
        with suppress(filao.ConfigurationError):
            read(text)


def file_of_claims(content: bytes) -> None:
    """Read a CSV file that a visitor of the sandbox chose, from a disk and from a browser."""
    for read in (
        lambda: claims.claims_of("claims.csv", BytesIO(content), 1_000),
        lambda: claims.from_text("claims.csv", content.decode(errors="replace"), 1_000),
    ):
        with suppress(claims.BadClaimsError):
            for claim in read():
                assert msgspec.json.encode(claim)


def body(content: bytes) -> None:
    """Read a body and headers, as another program has stored them, for consumers and for operators."""
    for kind in (0, 1):
        for typed in (None, Body):
            with suppress(ValueError):
                codec_for(typed).decode(kind, content)
        seen_body(kind, content)
    assert isinstance(is_too_deep(content), bool)
    text = content.decode(errors="replace")
    assert isinstance(seen_headers(text), dict)
    with suppress(filao.EngineError):
        decode_headers(text)
    assert "\x1b" not in printable(text)
    with suppress(ValueError):
        value = msgspec.json.decode(content)
        shown = printable_json(msgspec.json.encode(value))
        assert msgspec.json.decode(shown) == value


class Events:
    """Events of a page of the sandbox, for a room in which nothing was done."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._visit = self._loop.run_until_complete(self._enter())

    async def _enter(self) -> Visit:
        visit = Visit(await Room(Path(tempfile.mkdtemp(prefix="filao-fuzz-"))).__aenter__())
        visit._looking.cancel()
        return visit

    def __call__(self, content: bytes) -> None:
        try:
            given = msgspec.json.decode(content, type=dict[str, Any])
        except (ValueError, RecursionError):
            return  # the page's socket reads it in the same way
        asked = Asked(given)
        for name in given:
            assert 1 <= asked.number(name, 1, 9) <= 9
            assert 0 <= asked.whole(name, 0, 9) <= 9
            assert len(asked.text(name, 3)) <= 3
            assert asked.choice(name, ("a", "b")) in ("a", "b")
            asked.texts(name)
            asked.mapping(name)
        for verb in PURE:
            self._loop.run_until_complete(self._do({**given, "do": verb}))

    async def _do(self, asked: Mapping[str, Any]) -> None:
        assert asked["do"] in VERBS
        with suppress(RoomError):
            await handle(self._visit, asked, may_run_code=False)


TARGETS: Mapping[str, Callable[[], Target]] = {
    "rules": lambda: rules,
    "register": lambda: the_register,
    "envelope": lambda: the_envelope,
    "url": lambda: url,
    "claims": lambda: file_of_claims,
    "body": lambda: body,
    "events": Events,
}
WORDS = (
    *msgspec.json.decode(rules_to_json(filao.Queue("q"))),
    *("first", "factor", "ceiling", "jitter", "version", "rules", "x-death", "reason", "x-filao-attempt", "null"),
    *("IDpol", "ClaimAmount", "claim_id", "true", "1e999", "9007199254740993", "step", "chosen", "done", "consumer"),
)
"""What a random change would take long to come upon."""
_RULES = rules_to_json(filao.Queue("claims")).encode()
_PAGE = b'{"claims":{"version":3,"rules":' + _RULES + b"}}"
_DEATHS = b"\x07x-deathA\0\0\0\x15F\0\0\0\x10\x06reasonS\0\0\0\x04once"
SEEDS: Mapping[str, tuple[bytes, ...]] = {
    "rules": (_RULES, b'{"emulate":["delay"],"backoff":{"first":1e3}}'),
    "register": (_PAGE, b'{"q":{"version":1,"rules":{"body_max":1}}}', b"{}"),
    "envelope": (
        b"text/jso claim-9 " + _DEATHS + b'\xff\xfe{"claim_id":7}',
        b"\xff" * 16 + b"\x01aF\0\0\0\0\x01bt\x01",
    ),
    "url": (
        b"\x01u:p@h:5432/d?sslmode=require",
        b"\x04/claims.db",
        b"\x02u:%C3%A9@[::1]:5672/v#f",
        b"\0host=h password=p",
    ),
    "claims": (b"IDpol,ClaimAmount\n7,12.50\n", b'\xef\xbb\xbfa,"ClaimAmount",IDpol\r\n,1e9,3\r\n'),
    "body": (b'{"claim_id":7,"town":"Nice"}', b"[" * 300 + b"]" * 300, b'{"trace":"\\u009b"}', b"\x1b[2J"),
    "events": (
        b'{"step":9999,"speed":0,"consumer":1e308,"place":-1,"chosen":{"a":2},"done":["create",1]}',
        b'{"text":"IDpol,ClaimAmount\\n1,2\\n","name":"x","current":null,"value":true}',
    ),
}
