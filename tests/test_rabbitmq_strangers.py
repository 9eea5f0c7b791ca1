"""RabbitMQ: what strangers may publish to a queue, its dead letters and the register, and what must not come of it."""

import asyncio
import gc
import json
import logging
import re
import struct
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pamqp.decode
import pika
import pika.data
import pytest
from pamqp.exceptions import PAMQPException

import filao
from filao.engines.rabbitmq import register, server, topology, wire
from filao.engines.rabbitmq.server import LOST_OFTEN
from tests.conftest import engine_of
from tests.support.proxy import Proxy
from tests.support.servers import Rabbitmq, rabbitmq_server
from tests.support.working import until

pytestmark = pytest.mark.anyio

SECURITY = Path(__file__).parents[1] / "SECURITY.md"
_names = count()


@pytest.fixture
def queue() -> filao.Queue:
    return filao.Queue(f"strange{next(_names)}", backoff=filao.Backoff(first=0))


@pytest.fixture
async def broker(rabbitmq: Rabbitmq, queue) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(rabbitmq.url()) as broker:
        await broker.declare(queue)
        yield broker


@pytest.fixture
def foreign(rabbitmq: Rabbitmq) -> Iterator[Any]:
    """Return the channel of a program that knows no Filao."""
    with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq.url()))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


class Raw(pika.BasicProperties):  # type: ignore[misc]  # pika has no types
    """Properties whose bytes are written as they are given."""

    def __init__(self, flags: int, content: bytes) -> None:
        super().__init__()
        self._given = [struct.pack(">H", flags), content]

    def encode(self) -> list[bytes]:
        return list(self._given)  # to which pika adds


HEADERS, MESSAGE_ID, CONTENT_TYPE = 1 << 13, 1 << 7, 1 << 15


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def nested(depth: int, kind: bytes = b"F") -> bytes:
    content = b""
    for _ in range(depth):
        content = (short(b"a") if kind == b"F" else b"") + kind + table(content)
    return table(content if kind == b"F" else short(b"a") + content)


UNREADABLE = {
    "an id that is not UTF-8": Raw(MESSAGE_ID, short(b"claim-\xff")),
    "a content type that is not UTF-8": Raw(CONTENT_TYPE, short(b"\xe9")),
    "a header's name that is not UTF-8": Raw(HEADERS, table(short(b"caf\xe9") + b"S" + table(b"au lait"))),
    "tables within tables": Raw(HEADERS, nested(5_000)),
    "arrays within arrays": Raw(HEADERS, nested(5_000, b"A")),
    "arrays within arrays to the limit of a frame": Raw(HEADERS, nested(20_000, b"A")),
}


@pytest.mark.parametrize("properties", UNREADABLE.values(), ids=UNREADABLE)
async def test_what_cannot_be_read_is_a_malformed_dead_letter_and_stops_nobody(
    broker, foreign, queue, properties
) -> None:
    foreign.basic_publish("", queue.name, b'"strange"', properties)
    await broker.send_to_queue(queue, "ours")
    message = await broker.receive_from_queue(queue, wait=10)
    assert message is not None
    assert message.body == "ours"
    (letter,) = await broker.dead_letters(queue)
    assert letter.body in ("strange", b'"strange"')
    assert letter.reason == "malformed"
    assert letter.error
    await message.ack()
    assert await broker.redrive(queue) == 1  # an operator who has looked at it may send it back
    again = await broker.receive_from_queue(queue, wait=10)
    assert again is not None
    assert again.body == letter.body
    await again.ack()


async def test_a_routing_key_that_is_not_utf_8_is_no_matter(rabbitmq, broker, foreign, queue) -> None:
    foreign.exchange_declare(f"{queue.name}.all", exchange_type="fanout")
    foreign.queue_bind(queue.name, f"{queue.name}.all")

    class Key(str):
        __slots__ = ()

        def encode(self, *_: str) -> bytes:
            return b"caf\xe9"

    foreign.basic_publish(f"{queue.name}.all", Key("x"), b"7")
    message = await broker.receive_from_queue(queue, wait=10)
    assert message is not None
    assert message.body == 7
    await message.ack()


async def test_headers_that_cannot_be_written_again_do_not_keep_a_message_from_dying(broker, foreign, queue) -> None:
    headers = {"bytes": b"\xff" * 10, "deep": json.loads("[" * 60 + "]" * 60)}
    large = {f"large{number}": "x" * 20_000 for number in range(6)}  # in all, what one frame holds
    foreign.basic_publish("", queue.name, b"1", pika.BasicProperties(headers=headers | large))
    message = await broker.receive_from_queue(queue, wait=10)
    assert message is not None
    assert message.headers["large0"] == "x" * 20_000
    await message.reject("no " * 3_000)
    (letter,) = await broker.dead_letters(queue)
    assert letter.reason == "rejected"
    assert {"bytes", "deep"} <= letter.headers.keys()
    assert await broker.redrive(queue) == 1


async def test_the_copies_of_a_message_are_not_delivered_again(broker, foreign, queue) -> None:
    foreign.queue_declare(f"{queue.name}.copies")
    properties = pika.BasicProperties(headers={"CC": [f"{queue.name}.copies"]})
    foreign.basic_publish("", queue.name, b"1", properties)
    message = await broker.receive_from_queue(queue, wait=10)
    assert message is not None
    await message.reject()
    await broker.redrive(queue)
    assert foreign.queue_declare(f"{queue.name}.copies", passive=True).method.message_count == 1


@pytest.mark.parametrize("name", ["CC", "BCC", "x-death", "x-delivery-count", "x-filao-attempt"])
async def test_a_header_that_the_server_acts_upon_is_refused(broker, queue, name) -> None:
    with pytest.raises(filao.MessageError, match=name):
        await broker.send_to_queue(queue, 1, headers={name: "x"})
    await broker.send_to_queue(queue, 1, headers={f"y-{name}": "x", "CCs": "x"})


async def test_a_connection_that_is_lost_again_and_again_is_told_of(rabbitmq, queue, caplog) -> None:
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as broker:
            await broker.declare(queue)
            async with asyncio.timeout(60):
                while not told(caplog):
                    assert await broker.receive_from_queue(queue, wait=0) is None  # opens what was lost
                    ended = asyncio.Event()
                    engine_of(broker)._receiving._session.when_ended(ended.set)
                    proxy.reset()
                    await ended.wait()
            assert re.search(rf"lost {LOST_OFTEN} times.*Server", told(caplog)[0])
            assert "cannot be read" not in told(caplog)[0]
            await broker.send_to_queue(queue, 1)


async def test_a_message_that_ends_each_connection_is_named_as_the_cause(
    broker, foreign, queue, caplog, monkeypatch
) -> None:
    def read_table(content: bytes) -> Any:
        if b"no table" in content[:30]:
            raise PAMQPException("unheard of")
        return wire.read_table(content)

    monkeypatch.setitem(pamqp.decode.METHODS, "table", read_table)
    monkeypatch.setattr(server, "LOST_OFTEN", 1)
    foreign.basic_publish("", queue.name, b"1", pika.BasicProperties(headers={"no table": "at all"}))
    async with asyncio.timeout(60):
        while not told(caplog):
            with suppress(filao.EngineUnavailable):
                assert await broker.receive_from_queue(queue, wait=0) is None
    assert re.search("by: unheard of. A message that cannot be read.*head of its queue", told(caplog)[0])


def told(caplog) -> list[str]:
    """Return the warnings of connections that were lost."""
    return [record.getMessage() for record in caplog.records if "connection was lost" in record.getMessage()]


async def test_sends_that_the_server_refuses_together_all_hear_why_and_cost_no_connection(
    broker, foreign, queue, caplog
) -> None:
    """The server ended the connection, again and again: the client library published on a channel that was closed."""
    queue = filao.Queue(f"{queue.name}.delayed", emulate=("delay",))
    await broker.declare(queue)
    foreign.exchange_delete(f"{topology.DELAY}.01")
    await broker.send_to_queue(queue, 0)
    first = engine_of(broker)._sending._session
    for _ in range(3):
        sends = (broker.send_to_queue(queue, number, delay=0.2) for number in range(100))
        for error in await asyncio.gather(*sends, return_exceptions=True):
            assert "ladder of delays" in str(error)
    await broker.declare(queue)
    await broker.send_to_queue(queue, 1, delay=0.2)
    assert engine_of(broker)._sending._session is first
    assert not told(caplog)


async def test_a_connection_that_is_silent_for_too_long_is_lost_and_cancels_nobody(rabbitmq, queue, caplog) -> None:
    """A send was told that its broker was closed; a task that tidies up would have ended for ever."""
    caplog.set_level(logging.INFO, "filao.rabbitmq")
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as broker:
            await broker.declare(queue)
            await broker.send_to_queue(queue, 1)
            proxy.stall()
            waiting = asyncio.create_task(broker.send_to_queue(queue, 2))
            session = engine_of(broker)._sending._session
            await until(lambda: session._outlets[queue.name]._users)
            session._connection.transport.connection._reader_task.cancel()  # as the library itself does then
            with pytest.raises(filao.EngineUnavailable, match=r"the server gave no sign of life\. If this was a send"):
                await waiting
            proxy.go_on()
            await broker.send_to_queue(queue, 3)
    assert any("by: the server gave no sign of life" in text for text in told(caplog))


async def test_a_connection_that_is_lost_once_is_told_of_once_however_long_the_server_is_away(
    rabbitmq, queue, caplog
) -> None:
    caplog.set_level(logging.INFO, "filao.rabbitmq")
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as broker:
            await broker.declare(queue)
            await broker.send_to_queue(queue, 1)
            ended = asyncio.Event()
            engine_of(broker)._sending._session.when_ended(ended.set)
            proxy.lead_to(1)  # where nobody answers
            proxy.reset()
            await ended.wait()
            for _ in range(2 * LOST_OFTEN):
                with pytest.raises(filao.EngineUnavailable):
                    await broker.send_to_queue(queue, 2)
    (told,) = [record for record in caplog.records if "connection was lost" in record.getMessage()]
    assert told.levelname == "INFO"


@pytest.mark.parametrize("how", ["refused", "lost"])
def test_a_connection_does_not_close_itself_when_it_is_collected(rabbitmq, queue, how) -> None:
    """Where no event loop runs, Python would warn of it; pytest makes an error of that."""

    async def end() -> None:
        with closing(Proxy(rabbitmq.port)) as proxy:
            async with filao.connect(rabbitmq.url(proxy.port)) as broker:
                await broker.declare(queue)
                assert await broker.receive_from_queue(queue, wait=0) is None
                ended = asyncio.Event()
                engine_of(broker)._receiving._session.when_ended(ended.set)
                proxy.reset()
                await ended.wait()
                assert await broker.receive_from_queue(queue, wait=0) is None

    async def fail() -> None:
        async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
            with pytest.raises(filao.EngineUnavailable):
                await filao.connect(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}/").open()

    loop = asyncio.new_event_loop()
    gc.disable()
    try:
        loop.run_until_complete(fail() if how == "refused" else end())
    finally:
        gc.enable()
    gc.collect()
    loop.close()


# --- dead letters ----------------------------------------------------------------------------------------------------

STRANGE_DEATHS: list[Any] = [7, "text", [[1, 2], [3]], [{}], [{"reason": ["a"], "time": "b"}], {"reason": 1}, []]


async def test_dead_letters_with_strange_records_of_deaths_are_shown_with_the_others(broker, foreign, queue) -> None:
    await broker.send_to_queue(queue, "ours")
    message = await broker.receive_from_queue(queue, wait=10)
    assert message is not None
    await message.reject("looked at")
    for number, deaths in enumerate(STRANGE_DEATHS):
        properties = pika.BasicProperties(headers={"x-death": deaths, "x-filao-died-at": "1" * 5_000})
        foreign.basic_publish("", topology.dead_name(queue.name), str(number).encode(), properties)
    foreign.basic_publish("", topology.dead_name(queue.name), b"8", UNREADABLE["tables within tables"])
    foreign.basic_publish("", topology.dead_name(queue.name), b"9")
    letters = await broker.dead_letters(queue)
    assert [letter.body for letter in letters] == ["ours", *range(len(STRANGE_DEATHS)), 8, 9]
    assert {letter.reason for letter in letters} == {"rejected"}
    assert await broker.redrive(queue) == len(letters)


async def test_the_doctor_tells_when_the_server_passes_on_nothing_that_expires(tmp_path_factory, queue) -> None:
    """On 3.10 one message ends the server's own worker."""
    with rabbitmq_server(tmp_path_factory.mktemp("expiry") / "server") as node:
        async with filao.connect(node.url()) as broker:
            await broker.declare(queue)
            assert {finding.subject: finding.level for finding in await broker.doctor()}["expiry"] == "ok"
            if not engine_of(broker)._server.version.startswith("3.10."):
                pytest.skip("this version bears it")
            with closing(pika.BlockingConnection(pika.URLParameters(node.url()))) as connection:
                channel = connection.channel()
                channel.confirm_delivery()
                properties = pika.BasicProperties(expiration="1", headers={"x-death": [[1]]})
                channel.basic_publish("", queue.name, b"1", properties)
            async with asyncio.timeout(60):
                while True:
                    findings = {finding.subject: finding for finding in await broker.doctor()}
                    if findings["expiry"].level != "ok":
                        break
            assert "x-death" in findings["expiry"].text


async def test_a_redrive_ends_though_dead_letters_go_on_arriving(rabbitmq, broker, foreign, queue) -> None:
    ended = threading.Event()

    def publish() -> None:
        with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq.url()))) as connection:
            channel = connection.channel()
            channel.confirm_delivery()  # faster than a redrive, but no flood that a busy machine cannot get through
            while not ended.is_set():
                channel.basic_publish("", topology.dead_name(queue.name), b"late")

    for _ in range(20):
        foreign.basic_publish("", topology.dead_name(queue.name), b"early")
    publishing = threading.Thread(target=publish)
    publishing.start()
    try:
        async with asyncio.timeout(60):
            while len(await broker.dead_letters(queue, limit=21)) < 21:
                pass
            first = await broker.redrive(queue)
            assert first >= 21
            assert (await broker.stats(queue.name)).dead > 0
    finally:
        ended.set()
        publishing.join()


# --- policies ---------------------------------------------------------------------------------------------------------


async def test_a_policy_that_limits_the_length_of_all_queues_costs_no_dead_letter(rabbitmq, broker, queue) -> None:
    for body in range(6):
        await broker.send_to_queue(queue, body)
    messages = await broker.receive_many(queue, 6, wait=10)
    limit = ["short", f"^{re.escape(queue.name)}", '{"max-length": 1}']
    await asyncio.to_thread(rabbitmq.command, "set_policy", "--apply-to", "queues", *limit)
    refused: list[filao.Message] = []
    for message in messages:
        try:
            await message.reject("no")
        except filao.EngineUnavailable:
            refused.append(message)
    await asyncio.to_thread(rabbitmq.command, "clear_policy", "short")
    dead = [letter.body for letter in await broker.dead_letters(queue)]
    assert sorted([*dead, *(message.body for message in refused)]) == list(range(6))


# --- the register ----------------------------------------------------------------------------------------------------


def rules(**changed: Any) -> dict[str, Any]:
    return {"version": 10**6, "rules": {"backoff": {"first": 0}, **changed}}


STRANGE_REGISTERS: dict[str, Any] = {
    "no JSON": b"not json",
    "another type": b"[1, 2]",
    "deep": b"[" * 100_000,
    "a name that is none": json.dumps({"no name!\n": rules()}).encode(),
    "rules that are none": json.dumps({"other": {"version": 1, "rules": 7}, "third": 7}).encode(),
    "no UTF-8": b'{"other": {"version": 1, "rules": {"backoff": {"\xe6irst": 0}}}}',
    "a version that is none": b'{"other": {"version": 1e400, "rules": {}}}',
}


@pytest.mark.parametrize("content", STRANGE_REGISTERS.values(), ids=STRANGE_REGISTERS)
async def test_a_strange_register_is_passed_over_and_the_doctor_says_so(
    rabbitmq, broker, foreign, queue, content
) -> None:
    foreign.basic_publish("", topology.REGISTER, content)
    try:
        async with filao.connect(rabbitmq.url()) as other:
            await other.declare(filao.Queue(f"{queue.name}.new", backoff=filao.Backoff(first=0)))
            names = {known.name for known in await other.queues()}
            assert {queue.name, f"{queue.name}.new"} <= names
            assert "no name!\n" not in names
            assert queue.name in {stats.name for stats in await other.stats()}
            findings = {finding.subject: finding for finding in await other.doctor()}
            assert findings["register"].level == "warning"
            assert "filao.queues" in findings["register"].text
    finally:
        foreign.queue_purge(topology.REGISTER)
        foreign.exchange_delete(topology.REGISTER)


def _no_register(foreign: Any) -> None:
    foreign.queue_delete(topology.REGISTER)


def _another_register(**arguments: str) -> Callable[[Any], None]:
    def make(foreign: Any) -> None:
        foreign.queue_delete(topology.REGISTER)
        foreign.queue_declare(topology.REGISTER, durable=True, arguments=arguments)

    return make


@pytest.mark.parametrize("spoil", [_no_register, _another_register(), _another_register(**{"x-queue-type": "stream"})])
async def test_a_register_that_was_deleted_or_made_anew_is_named_and_can_be_mended(
    rabbitmq, broker, foreign, queue, spoil
) -> None:
    await broker.send_to_queue(queue, 7)
    spoil(foreign)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(register, "HELD_MAX", 0.1)
            with pytest.raises(
                filao.EngineUnavailable, match=r"register.*'filao\.queues'.*delete the queue and the exch"
            ):
                await filao.connect(rabbitmq.url()).open()
            findings = {finding.subject: finding for finding in await broker.doctor()}
        assert findings["register"].level == "error"
        assert "delete the queue and the exchange 'filao.queues'" in findings["register"].text
        assert findings[f"queue {queue.name}"].text == "1 ready, 0 dead letters"
    finally:
        foreign.queue_delete(topology.REGISTER)
        foreign.exchange_delete(topology.REGISTER)
    await broker.declare(queue)
    async with filao.connect(rabbitmq.url()) as other:
        message = await other.receive_from_queue(queue, wait=10)
        assert message is not None
        assert message.body == 7


async def test_the_doctor_finds_a_queue_that_was_made_anew_as_another(broker, foreign, queue) -> None:
    foreign.queue_delete(queue.name)
    foreign.queue_declare(queue.name, durable=True)
    findings = {finding.subject: finding for finding in await broker.doctor()}
    assert findings[f"queue {queue.name}"].level == "error"
    assert "with other arguments" in findings[f"queue {queue.name}"].text


@pytest.mark.parametrize("part", ["exchange", "queue"])
async def test_a_broken_ladder_is_named_and_is_mended_by_a_declaration(broker, foreign, queue, part) -> None:
    queue = filao.Queue(f"{queue.name}.delayed", emulate=("delay",))
    await broker.declare(queue)
    step = f"{topology.DELAY}.01"  # where a delay of 0.2 s begins
    getattr(foreign, f"{part}_delete")(step)
    with pytest.raises(filao.EngineUnavailable, match=r"ladder of delays.*Nothing was sent\. Declare the queue"):
        await broker.send_to_queue(queue, 7, delay=0.2)
    findings = {finding.subject: finding for finding in await broker.doctor()}
    assert findings["delays"].level == "error"
    assert step in findings["delays"].text
    await broker.declare(queue)
    await broker.send_to_queue(queue, 7, delay=0.2)
    message = await broker.receive_from_queue(queue, wait=10)
    assert message is not None
    assert "delays" not in {finding.subject for finding in await broker.doctor()}


async def test_the_permissions_of_the_docs_keep_a_producer_away_from_the_register(
    rabbitmq, broker, foreign, queue
) -> None:
    permissions = re.search(r"set_permissions -p claims portal '(.*)' '(.*)' '(.*)'", SECURITY.read_text())
    assert permissions
    rabbitmq.command("add_user", "portal", "portal")
    rabbitmq.command("set_permissions", "portal", *permissions.groups())
    foreign.exchange_declare("claims.incoming", durable=True)
    foreign.queue_bind(queue.name, "claims.incoming", "storm")
    url = rabbitmq.url().replace("guest:guest", "portal:portal")

    def publish(exchange: str, key: str) -> None:
        with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish(exchange, key, b"7")

    publish("claims.incoming", "storm")
    message = await broker.receive_from_queue(queue, wait=10)
    assert message is not None
    assert message.body == 7
    for key in (topology.REGISTER, topology.dead_name(queue.name), queue.name):
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
            publish("", key)
