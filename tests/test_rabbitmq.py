"""RabbitMQ: what it is asked for and refuses, whom it shares queues with, and what it survives."""

import asyncio
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from itertools import count
from typing import Any

import aiormq.exceptions
import pika
import pytest
from aiormq import Channel, spec

import filao
import filao.sync
from filao import session
from filao.conformance import Verdict, checks, verify
from filao.dashboard import pages
from filao.dashboard.acts import Act
from filao.engine import Ack, Batch, Feature, Operation, Receive, Settle
from filao.engines.rabbitmq import (
    RabbitmqEngine,
    consumer,
    control,
    doctor,
    engine,
    errands,
    register,
    server,
    topology,
)
from filao.engines.rabbitmq.publisher import LARGE_AT_ONCE, Publisher
from filao.message import delivery_of
from tests.conftest import UVLOOP, engine_of
from tests.support.load import loaded
from tests.support.proxy import Proxy
from tests.support.servers import Rabbitmq, rabbitmq_cluster, rabbitmq_server
from tests.support.visitor import rows, visiting
from tests.support.working import running, until, until_stats

pytestmark = pytest.mark.anyio

AT_ONCE = filao.Backoff(first=0)
_names = count()


@pytest.fixture
def url(rabbitmq: Rabbitmq) -> str:
    return rabbitmq.url()


@pytest.fixture
def queue() -> filao.Queue:
    """Return a queue of the test's own, not declared yet."""
    return filao.Queue(f"claims{next(_names)}", backoff=AT_ONCE)


@pytest.fixture
async def broker(url, queue) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(url) as broker:
        await broker.declare(queue)
        yield broker


@pytest.fixture
def foreign(rabbitmq: Rabbitmq) -> Iterator[Any]:
    """Return the channel of a program that knows no Filao."""
    with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq.url()))) as connection:
        yield connection.channel()


async def received(broker: filao.Broker, queue: filao.Queue) -> filao.Message:
    message = await broker.receive_from_queue(queue, wait=10)
    assert message is not None
    return message


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdicts(rabbitmq: Rabbitmq) -> dict[str, Verdict]:
    """Run the whole contract, all checks at once: here time cannot be moved."""
    found = asyncio.run(verify(lambda: filao.connect(rabbitmq.url())))
    return {verdict.check: verdict for verdict in found}


@pytest.mark.parametrize(
    "check",
    [
        check.__name__.removeprefix("check_").replace("_", " ")
        for check in checks(RabbitmqEngine.features | RabbitmqEngine.emulated)
    ],
)
def test_the_contract(verdicts: dict[str, Verdict], check: str) -> None:
    assert verdicts[check].error == ""


async def test_the_contract_leaves_nothing_behind(verdicts, url) -> None:
    async with filao.connect(url) as broker:
        assert not [queue.name for queue in await broker.queues() if "verify" in queue.name]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        ({"lease": 60}, "lease=60"),
        ({"max_length": 5}, "max_length=5"),
        ({"overflow": "drop_oldest"}, "overflow"),
        ({"on_expiry": "drop"}, "on_expiry"),
        ({"dedup_window": 60}, "deduplication"),
        ({"group_failure": "skip"}, "groups"),
        ({"group_dead": "halt"}, "groups"),
        ({"backoff": filao.Backoff()}, r'default backoff.*emulate=\("delay",\)'),
        ({"backoff": filao.Backoff(first=5)}, r"backoff=Backoff\(first=5.*ladder"),
    ],
)
async def test_a_rule_that_cannot_be_kept_is_refused_when_it_is_declared(broker, queue, rules, what) -> None:
    name = f"{queue.name}.refused"
    with pytest.raises(filao.UnsupportedFeature, match=rf"{name}.*{what}.*SQLite, PostgreSQL"):
        await broker.declare(filao.Queue(name, **({"backoff": AT_ONCE} | rules)))
    assert name not in [known.name for known in await broker.queues()]


@pytest.mark.parametrize("name", ["claims.dead", "filao.queues", "amq.claims"])
async def test_a_name_that_is_taken_is_refused(broker, name) -> None:
    with pytest.raises(filao.ConfigurationError, match=name):
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))


@pytest.mark.parametrize(
    ("terms", "what"),
    [
        ({"group": "policy-1"}, "groups"),
        ({"priority": 1}, "priorities"),
        ({"dedup_key": "k"}, "deduplication"),
        ({"delay": 5}, "delay=5"),
    ],
)
async def test_a_message_that_asks_for_too_much_is_not_sent(broker, queue, terms, what) -> None:
    with pytest.raises(filao.UnsupportedFeature, match=f"{queue.name}.*{what}"):
        await broker.send_to_queue(queue, 1, **terms)
    assert await broker.receive_from_queue(queue, wait=0) is None


async def test_calls_that_it_has_not_are_refused(broker, queue) -> None:
    await broker.send_to_queue(queue, 1)
    message = await received(broker, queue)
    for call in (
        broker.receive_from_queue(queue, lease=60),
        broker.peek(queue),
        broker.pause(queue),
        broker.cancel(queue, "1"),
        broker.purge(queue, state="leased"),
        broker.resume(queue, group="g"),
        broker.send_to_queue(queue, 1, within=object()),
        message.nack(delay=5),
    ):
        with pytest.raises(filao.UnsupportedFeature, match="SQLite, PostgreSQL"):
            await call
    with pytest.raises(filao.UnsupportedFeature, match="transactions"):
        async with broker.transaction():
            pass
    await message.extend(60)  # its lease lasts as long as the connection
    await message.ack()
    with pytest.raises(filao.ConfigurationError, match="clock"):
        filao.connect("amqp://127.0.0.1/", clock=lambda: 0.0)


async def test_a_worker_that_wants_transactions_is_refused(url, queue) -> None:
    worker = filao.Worker(url)

    @worker.consumer(queue, guarantee="exactly-once")
    async def handle(message: filao.Message, tx: filao.Transaction) -> None: ...

    with pytest.raises(filao.UnsupportedFeature, match="exactly-once"):
        await worker.run()


@pytest.mark.parametrize("wants", [filao.Retry("not yet", delay=5), filao.Release(delay=5)])
async def test_a_handler_that_wants_a_delay_that_its_queue_has_not_fails_and_holds_nothing(url, queue, wants) -> None:
    worker = filao.Worker(url)

    @worker.consumer(queue)
    async def handle(message: filao.Message) -> None:
        if message.attempt == 1:
            raise wants

    async with filao.connect(url) as broker:
        await broker.declare(queue)
        await broker.send_to_queue(queue, 7)
    handled = await worker.drain(limit=2)
    assert [(one.how, one.attempt) for one in handled] == [("retried", 1), ("acked", 2)]
    assert "delay=5" in handled[0].error


async def test_a_queue_with_other_arguments_is_refused_and_they_are_named(broker, foreign, queue) -> None:
    name = f"{queue.name}.classic"
    foreign.queue_declare(name, durable=True)
    with pytest.raises(filao.ConfigurationError, match=rf"'{name}' is on the server.*inequivalent arg 'x-.*'quorum'"):
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))


async def test_a_body_above_the_servers_limit_is_refused_and_harms_no_other(broker, queue) -> None:
    large = filao.Queue(f"{queue.name}.large", backoff=AT_ONCE, body_max=2_000_000)
    await broker.declare(large)
    sends = [broker.send_to_queue(queue, number) for number in range(20)]
    sends.insert(10, broker.send_to_queue(large, b"x" * 1_500_000))
    results = await asyncio.gather(*sends, return_exceptions=True)
    (refused,) = [result for result in results if isinstance(result, BaseException)]
    assert isinstance(refused, filao.MessageTooLarge)
    assert "1,500,000 bytes" in str(refused)
    assert "max_message_size" in str(refused)
    await broker.send_to_queue(large, b"x" * 900_000)
    assert len((await received(broker, large)).body) == 900_000
    assert len(await broker.receive_many(queue, 100, wait=0)) == 20


async def test_what_is_above_a_limit_that_was_lowered_dies_once_it_is_raised_and_harms_no_other(
    rabbitmq, url, broker, queue
) -> None:
    """A settle was refused for good, so that its message stayed with a worker for as long as its connection lasted."""

    async def limit(number: int) -> None:
        old = f"application:set_env(rabbit, max_message_size, {number})"
        await asyncio.to_thread(rabbitmq.command, "eval", f"{old}, persistent_term:put(max_message_size, {number}).")

    await broker.send_to_queue(queue, b"x" * 60_000)
    message = await received(broker, queue)
    await limit(50_000)
    try:
        with pytest.raises(filao.EngineUnavailable, match=r"60,000 bytes is above .*max_message_size.*Raise it"):
            await message.reject("broken")
        async with filao.connect(url) as far:
            bodies = [1, 2, b"x" * 60_000, 3, 4]
            results = await asyncio.gather(*(far.send_to_queue(queue, body) for body in bodies), return_exceptions=True)
            assert isinstance(results.pop(2), filao.MessageTooLarge)
            assert {type(one) for one in results} <= {filao.Receipt, filao.EngineUnavailable}
    finally:
        await limit(1_000_000)
    await message.reject("broken")
    assert (await broker.stats(queue.name)).dead == 1


@pytest.mark.parametrize(
    ("change", "error", "texts"),
    [
        (lambda url: url.replace("guest:guest", "guest:geheim"), filao.ConfigurationError, ["password"]),
        (lambda url: url + "?auth=external", filao.ConfigurationError, ["PLAIN", "Mend auth= in", "auth_mechanisms"]),
        (lambda url: url + "?cacertfile=ca.pem", filao.ConfigurationError, ["'cacertfile'", "nothing here", "cafile"]),
        (lambda url: url + "nowhere", filao.ConfigurationError, ["nowhere", "virtual host"]),
        (lambda _: "amqp://u:geheim@127.0.0.1:1/", filao.EngineUnavailable, ["127.0.0.1:1", "away"]),
        (lambda _: "amqp://u:geheim@127.0.0.1:x/", filao.ConfigurationError, ["cannot be read"]),
        (lambda _: "amqp:///", filao.ConfigurationError, ["no host"]),
    ],
)
async def test_a_url_that_leads_nowhere_says_so_and_keeps_the_password_to_itself(url, change, error, texts) -> None:
    with pytest.raises(error) as raised:
        await filao.connect(change(url)).open()
    for text in texts:
        assert text in str(raised.value)
    assert "geheim" not in str(raised.value)


async def test_a_server_that_never_welcomes_us_says_that_nothing_was_done(monkeypatch) -> None:
    monkeypatch.setattr(server, "CONNECTED_WITHIN", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://u:geheim@127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(filao.EngineUnavailable, match=r"not answered for 0\.3 s.*Nothing was done\.$"):
            await filao.connect(url).open()


@pytest.mark.parametrize("anyio_backend", ["asyncio", UVLOOP], ids=["asyncio", "uvloop"])
async def test_a_server_that_hangs_up_at_once_counts_as_away() -> None:
    """As a balancer does whose servers are away; under uvloop its end is often there before we listen."""
    with closing(Proxy(1)) as balancer:
        for _ in range(20):
            with pytest.raises(filao.EngineUnavailable, match=r"is away: .*Nothing was done\."):
                await filao.connect(f"amqp://u:geheim@127.0.0.1:{balancer.port}/").open()


async def test_tls_where_there_is_none_is_named(url) -> None:
    with pytest.raises(filao.EngineUnavailable, match=r"no TLS.*Nothing was done.*5671"):
        await filao.connect(url.replace("amqp:", "amqps:")).open()


@pytest.mark.parametrize("anyio_backend", ["asyncio", UVLOOP], ids=["asyncio", "uvloop"])
async def test_certificates_that_are_not_trusted_are_told_of_with_what_to_do(rabbitmq, tmp_path) -> None:
    def certified(name: str, host: str) -> str:
        """Make a certificate that is its own authority, and return where it lies."""
        subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={host}"]
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        files = ["-keyout", f"{tmp_path}/{name}.key", "-out", f"{tmp_path}/{name}.pem"]
        subprocess.run(["openssl", "req", "-x509", *curve, *files, *subject], check=True, capture_output=True)
        return f"{tmp_path}/{name}.pem"

    async def opened(certificate: str, settings: str, *, asks: bool = False, scheme: str = "amqps") -> str:
        """Connect to a server with a certificate, and return the words of the error; it perhaps `asks` for ours."""
        offered = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        offered.load_cert_chain(certificate, certificate.replace(".pem", ".key"))
        if asks:
            offered.verify_mode = ssl.CERT_REQUIRED
            offered.load_verify_locations(certificate)

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError), closing(writer):
                while piece := await reader.read(65536):
                    writer.write(piece)

        async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answers, questions = await asyncio.open_connection("127.0.0.1", rabbitmq.port)
            await asyncio.gather(carry(reader, questions), carry(answers, writer))

        async with await asyncio.start_server(lead, "127.0.0.1", 0, ssl=offered) as before:
            where = f"{scheme}://guest:guest@127.0.0.1:{before.sockets[0].getsockname()[1]}/?{settings}"
            try:
                async with filao.connect(where):
                    return ""
            except filao.FilaoError as error:
                return f"{type(error).__name__}: {error}"

    ours, anothers = certified("ours", "IP:127.0.0.1"), certified("anothers", "DNS:rabbit.example")
    key = ours.replace(".pem", ".key")
    assert not await opened(ours, f"cafile={ours}")
    assert not await opened(ours, f"cafile={ours}&certfile={ours}&keyfile={key}", asks=True)
    for certificate, trusted in ((ours, anothers), (anothers, anothers)):
        told = await opened(certificate, f"cafile={trusted}")
        assert re.search(r"Unavailable: .*no TLS.*VERIFY_FAILED.*Nothing was done\. The server's.*\?cafile=", told), (
            told
        )
    for files in (f"cafile={ours}.gone", f"cafile={ours}&certfile={ours}", f"cafile={key}"):
        told = await opened(ours, files)
        assert f"no TLS connection could be made: {files.replace('&', ', ')}: " in told
        assert "Mend these files" in told
    assert "asks its clients for certificates" in await opened(ours, f"cafile={ours}", asks=True)
    assert re.search("Unavailable: .*with amqps://", await opened(ours, "", scheme="amqp"))
    assert re.search("Configuration.*cafile=, and asks for no TLS", await opened(ours, f"cafile={ours}", scheme="amqp"))


async def test_a_user_without_permissions_is_told_what_to_grant(rabbitmq, url) -> None:
    await asyncio.to_thread(rabbitmq.command, "add_user", "clerk", "clerk")
    with pytest.raises(filao.ConfigurationError, match="set_permissions"):
        await filao.connect(url.replace("guest:guest", "clerk:clerk")).open()


async def test_a_limit_of_the_server_is_named_and_not_taken_for_something_else(rabbitmq, queue) -> None:
    async def command(*arguments: str) -> None:
        await asyncio.to_thread(rabbitmq.command, *arguments)

    await command("add_vhost", "limited")
    await command("set_permissions", "-p", "limited", "guest", ".*", ".*", ".*")
    await command("set_vhost_limits", "-p", "limited", '{"max-connections": 0}')
    broker = filao.connect(rabbitmq.url(vhost="limited"))
    with pytest.raises(filao.EngineUnavailable, match=r"connection limit \(0\).*Nothing was done.*set_vhost_limits"):
        await broker.open()  # it may pass, and who has worked here before waits for that
    await command("set_vhost_limits", "-p", "limited", '{"max-queues": 2}')  # the register and one more
    async with broker:
        with pytest.raises(
            filao.ConfigurationError, match=r"queue limit in vhost 'limited' \(2\) is reached"
        ) as raised:
            await broker.declare(queue)
    assert "other arguments" not in str(raised.value)


async def test_a_virtual_host_that_is_down_counts_as_away_and_not_as_a_mistake_of_ours(rabbitmq) -> None:
    """A worker that comes back meanwhile waits for it, where it ended for good."""
    for command in (
        ["add_vhost", "fallen"],
        ["set_permissions", "-p", "fallen", "guest", ".*", ".*", ".*"],
        ["eval", 'rabbit_vhost_sup_sup:delete_on_all_nodes(<<"fallen">>).'],
    ):
        await asyncio.to_thread(rabbitmq.command, *command)
    with pytest.raises(filao.EngineUnavailable, match=r"'fallen' ended .*is down\. .* Nothing was done\.$"):
        await filao.connect(rabbitmq.url(vhost="fallen")).open()


def test_a_connection_that_was_closed_is_called_so_and_not_by_its_place_in_memory() -> None:
    away = server.Server("amqp://127.0.0.1/")
    for closed, name in (
        ('<_Wire: "amqp://guest:******@h/?heartbeat=30" at 0x7f1>', "connection"),
        ('<Channel: "1" at 0x7f1>', "channel"),
    ):
        assert f"is away: its {name} closed." in str(away.engine_error(ConnectionResetError(f"{closed} closed")))


@pytest.mark.parametrize(
    ("error", "text", "untrue"),
    [
        (aiormq.exceptions.AuthenticationError("GSSAPI", ["PLAIN", "EXTERNAL"]), "ways to log in: GSSAPI", "password"),
        (aiormq.exceptions.ProbableAuthenticationError("mechanism EXTERNAL."), "the certificate", "password"),
        (aiormq.exceptions.ChannelInvalidStateError("Channel closed by RPC timeout"), "the channel of", "RPC timeout"),
        (aiormq.exceptions.ChannelClosed(None, None), "the channel of", "None"),
        (
            aiormq.exceptions.ConnectionInternalError("INTERNAL_ERROR - no leader"),
            "of its own: INTERNAL_ERROR -",
            "SSL",
        ),
    ],
)
def test_an_error_names_no_cause_that_it_has_not(error, text, untrue) -> None:
    said = str(server.Server("amqp://127.0.0.1/").engine_error(error))
    assert text in said
    assert untrue not in said
    assert "is away" not in said


async def test_a_queue_that_was_deleted_or_is_anothers_alone_does_not_mean_that_the_server_is_away(
    broker, foreign, queue
) -> None:
    foreign.queue_delete(queue.name)
    with pytest.raises(filao.EngineUnavailable, match=r"/': NOT_FOUND .*: it was deleted there\. Declare your queue"):
        await broker.purge(queue)
    foreign.queue_declare(queue.name, exclusive=True)
    with pytest.raises(filao.EngineUnavailable, match=r"/': RESOURCE_LOCKED .*: end that program"):
        await broker.declare(queue)


async def test_a_server_that_is_too_old_is_refused(url, monkeypatch) -> None:
    monkeypatch.setattr(server, "VERSION_MIN", (99, 0))
    with pytest.raises(filao.ConfigurationError, match=r"version \d.*Filao needs 99.0 or newer"):
        await filao.connect(url).open()


async def test_the_first_sends_keep_their_order(url, queue) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(queue)
        await asyncio.gather(*(broker.send_to_queue(queue, number) for number in range(50)))
        assert [message.body for message in await broker.receive_many(queue, 50, wait=0)] == list(range(50))


# --- shared with others ----------------------------------------------------------------------------------------------


async def test_of_messages_with_one_id_each_that_finds_no_queue_is_told(broker, foreign, queue) -> None:
    """The server returns what it cannot deliver by its id alone: one that was lost counted as confirmed."""
    other = filao.Queue(f"{queue.name}.other", backoff=AT_ONCE)
    await broker.declare(other)
    foreign.queue_delete(queue.name)
    sends = (broker.send_to_queue(to, 1, message_id="claim-7") for to in (queue, other, queue))
    first, stored, last = await asyncio.gather(*sends, return_exceptions=True)
    assert isinstance(first, filao.QueueNotFound)
    assert isinstance(last, filao.QueueNotFound)
    assert stored == filao.Receipt("claim-7")
    assert (await received(broker, other)).id == "claim-7"


async def test_a_queue_that_refuses_more_fails_no_send_to_another(broker, foreign, queue) -> None:
    """The channel on which it refused was closed, and with it ended what others had published there."""
    other = filao.Queue(f"{queue.name}.other", backoff=AT_ONCE)
    await broker.declare(other)
    foreign.queue_delete(queue.name)
    full = {"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"}
    foreign.queue_declare(queue.name, durable=True, arguments=full)
    refused = 0
    async with asyncio.timeout(60):
        while refused < 40:  # the server learns some messages later that the queue is full
            sends = (broker.send_to_queue(to, 1) for to in (queue, other) * 20)
            results = await asyncio.gather(*sends, return_exceptions=True)
            assert {type(one) for one in results[1::2]} == {filao.Receipt}
            assert {type(one) for one in results} <= {filao.Receipt, filao.EngineUnavailable}
            refused += sum(isinstance(one, filao.EngineUnavailable) for one in results)


async def test_messages_of_foreign_producers_are_received(broker, foreign, queue) -> None:
    def publish(body: bytes, **properties: Any) -> None:
        foreign.basic_publish("", queue.name, body, pika.BasicProperties(**properties))

    publish(b'{"claim_id": 7}')
    publish(b"not json")
    publish(b"[1]", content_type="application/json", message_id="their-own", headers={"trace": "a", "n": 7})
    publish(b"7", content_type="text/plain")
    publish(b"{broken", content_type="application/json")
    messages = await broker.receive_many(queue, 10, wait=0)
    assert [message.body for message in messages] == [{"claim_id": 7}, b"not json", [1], b"7"]
    assert messages[2].id == "their-own"
    assert messages[2].headers == {"trace": "a", "n": "7"}
    assert len({message.id for message in messages}) == 4
    (dead,) = await broker.dead_letters(queue)
    assert (dead.body, dead.reason) == (b"{broken", "malformed")
    await messages[0].reject("unknown claim")
    assert await broker.redrive(queue) == 2
    assert (await received(broker, queue)).body == {"claim_id": 7}


async def test_a_timestamp_that_is_no_date_ends_nothing(broker, foreign, queue) -> None:
    other = filao.Queue(f"{queue.name}.other", backoff=AT_ONCE)
    await broker.declare(other)
    await broker.send_to_queue(other, "held")
    held = await received(broker, other)
    for timestamp in (1_700_000_000_000, 1_700_000_000_000_000, 2**62):  # milliseconds, microseconds, nonsense
        foreign.basic_publish("", queue.name, b"1", pika.BasicProperties(timestamp=timestamp))
        message = await received(broker, queue)
        assert message.body == 1
        await message.reject("looked at")
    assert [letter.body for letter in await broker.dead_letters(queue)] == [1, 1, 1]
    await held.ack()


@pytest.mark.parametrize(
    "headers", [{"x-filao-sent-at": 9 * 10**18}, {"x-filao-attempt": 2**62}, {"x-delivery-count": -5}]
)
async def test_headers_that_cannot_be_ours_are_passed_over(broker, foreign, queue, headers) -> None:
    foreign.basic_publish("", queue.name, b"1", pika.BasicProperties(headers=headers))
    message = await received(broker, queue)
    assert (message.body, message.attempt) == (1, 1)
    await message.reject("looked at")
    (letter,) = await broker.dead_letters(queue)
    assert letter.attempts == 1


async def test_foreign_consumers_read_ours(broker, foreign, queue) -> None:
    receipt = await broker.send_to_queue(queue, {"claim_id": 7}, headers={"trace": "a"}, ttl=60)
    method, properties, body = foreign.basic_get(queue.name)
    assert json.loads(body) == {"claim_id": 7}
    assert (properties.content_type, properties.message_id, properties.delivery_mode) == (
        *("application/json", receipt.id),
        2,
    )
    assert properties.headers["trace"] == "a"
    assert properties.timestamp
    foreign.basic_ack(method.delivery_tag)


async def test_an_id_longer_than_amqps_comes_back_whole(broker, queue) -> None:
    name = "é" * 256
    assert (await broker.send_to_queue(queue, 1, message_id=name)).id == name
    message = await received(broker, queue)
    assert message.id == name
    await message.reject()
    assert await broker.redrive(queue, ids=[name]) == 1


async def test_the_name_of_a_header_comes_back_whole_or_is_refused(broker, queue) -> None:
    """AMQP's may have 128 bytes, and the client library cuts off the rest."""
    name = "é" * 64
    await broker.send_to_queue(queue, 1, headers={name: "y"})
    assert (await received(broker, queue)).headers == {name: "y"}
    with pytest.raises(filao.MessageTooLarge, match=r"128 bytes.*Nothing was sent"):
        await broker.send_to_queue(queue, 1, headers={name + "x": "y"})


async def test_a_queue_that_was_deleted_on_the_server_is_not_found(broker, foreign, queue) -> None:
    waiting = asyncio.ensure_future(broker.receive_from_queue(queue))
    async with asyncio.timeout(10):
        while not foreign.queue_declare(queue.name, passive=True).method.consumer_count:
            await asyncio.sleep(0.01)
    foreign.queue_delete(queue.name)
    for call in (waiting, broker.send_to_queue(queue, 1), broker.receive_from_queue(queue, wait=0)):
        with pytest.raises(filao.QueueNotFound, match=queue.name):
            async with asyncio.timeout(10):
                await call
    found = {finding.subject: finding for finding in await broker.doctor()}
    assert found[f"queue {queue.name}"].level == "error"
    await broker.declare(queue)
    await broker.send_to_queue(queue, 2)
    assert (await received(broker, queue)).body == 2


async def test_all_who_receive_from_a_queue_that_was_deleted_are_told_that(broker, foreign, queue) -> None:
    foreign.queue_delete(queue.name)
    calls = [broker.receive_from_queue(queue, wait=0) for _ in range(5)]
    told = await asyncio.gather(*calls, return_exceptions=True)
    assert all("was deleted on the server" in str(error) for error in told), told


async def test_when_the_dead_letters_queue_was_deleted_nothing_stays_held(url, broker, foreign, queue) -> None:
    await broker.send_to_queue(queue, "spent")
    for _ in range(queue.max_attempts):  # rejected, which servers of all versions count
        foreign.basic_reject(foreign.basic_get(queue.name)[0].delivery_tag)
    await broker.send_many(queue, range(3))
    foreign.queue_delete(f"{queue.name}.dead")
    with pytest.raises(filao.QueueNotFound, match=rf"dead letters of '{queue.name}'.*Queue\('{queue.name}'\)"):
        await broker.receive_many(queue, 4, wait=0)
    async with filao.connect(url) as other:
        await other.declare(queue)
        assert {(await received(other, queue)).body for _ in range(3)} == {0, 1, 2}


@asynccontextmanager
async def silent(rabbitmq: Rabbitmq, name: str) -> AsyncGenerator[None]:
    """Let the leader of a queue do nothing."""
    found = f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{name}">>))'
    for_leader = f"{found}, {{P, _}} = amqqueue:get_pid(Q), sys:%s(P)."
    await asyncio.to_thread(rabbitmq.command, "eval", for_leader % "suspend")
    try:
        yield
    finally:
        await asyncio.to_thread(rabbitmq.command, "eval", for_leader % "resume")


async def test_what_a_handler_rejects_waits_until_its_queue_of_dead_letters_is_there_again(
    url, broker, foreign, queue, monkeypatch
) -> None:
    worker = filao.Worker(url)
    bury, buried = Publisher.bury, []

    def counted(*arguments: Any) -> Any:
        buried.append(arguments)
        return bury(*arguments)

    monkeypatch.setattr(Publisher, "bury", counted)

    @worker.consumer(queue)
    async def handle(message: filao.Message) -> None:
        foreign.queue_delete(f"{queue.name}.dead")
        raise filao.Reject("no such policy")

    await broker.send_to_queue(queue, 7)
    async with running(worker):
        await until(lambda: len(buried) > 2)
        await broker.declare(queue)
        await until_stats(broker, queue.name, dead=1)


async def test_a_lease_ends_when_its_queue_is_deleted(url, broker, queue) -> None:
    await broker.send_to_queue(queue, 7)
    message = await received(broker, queue)
    async with filao.connect(url) as other:
        await other.delete_queue(queue, messages=True)
    await engine_of(broker)._declared.learn()
    for call in (message.extend(60), message.nack(), message.ack()):
        with pytest.raises(filao.LeaseLost, match="its queue was deleted"):
            await call


async def test_a_queue_whose_leader_is_slow_is_not_taken_for_empty(rabbitmq, broker, queue, foreign) -> None:
    """After a quarter of a second the server itself says that there is nothing; and the queue was deleted."""
    await _letters(broker, queue, foreign, "A")
    async with silent(rabbitmq, topology.dead_name(queue.name)):
        calls = [asyncio.create_task(call) for call in (broker.dead_letters(queue), broker.delete_queue(queue))]
        await asyncio.sleep(0)
    with pytest.raises(filao.ConfigurationError, match="was not deleted: it holds 1 message"):
        await calls[1]
    assert [letter.id for letter in await calls[0]] == ["A"]


async def test_the_ladder_goes_with_the_last_queue_that_needs_it(rabbitmq) -> None:
    rabbitmq.command("add_vhost", "ladder")
    rabbitmq.command("set_permissions", "-p", "ladder", "guest", ".*", ".*", ".*")
    async with filao.connect(rabbitmq.url(vhost="ladder")) as broker:
        first, second = (filao.Queue(name, emulate=("delay",)) for name in ("first", "second"))
        await broker.declare(first, second)
        await broker.delete_queue(first)
        await broker.send_to_queue(second, 1, delay=0.1)
        assert (await received(broker, second)).body == 1
        await broker.delete_queue(second, messages=True)
    assert rabbitmq.command("list_queues", "-p", "ladder", "--no-table-headers", "name").split() == ["filao.queues"]


async def test_the_register_may_be_read_as_often_as_one_likes(foreign, broker) -> None:
    foreign.queue_declare("filao.queues", durable=True, arguments=dict(topology.QUORUM))  # else it would be refused


async def test_processes_that_declare_together_forget_no_queue(url, queue) -> None:
    async def declare(number: int) -> None:
        async with filao.connect(url) as broker:
            for part in range(5):
                await broker.declare(filao.Queue(f"{queue.name}.{number}.{part}", backoff=AT_ONCE))

    await asyncio.gather(*(declare(number) for number in range(6)))
    async with filao.connect(url) as broker:
        names = {known.name for known in await broker.queues()}
    assert {f"{queue.name}.{number}.{part}" for number in range(6) for part in range(5)} <= names


async def test_two_registers_are_merged(broker, foreign, queue) -> None:
    """A process may die between the publication of a new register and the acknowledgement of the old one."""
    _, _, old = foreign.basic_get(topology.REGISTER, auto_ack=False)
    pages = json.loads(old)
    newer = {queue.name: {**pages[queue.name], "version": 99}}
    newer[queue.name]["rules"] = pages[queue.name]["rules"] | {"max_attempts": 77}
    foreign.confirm_delivery()
    foreign.basic_publish("", topology.REGISTER, json.dumps(newer).encode())
    foreign.basic_nack(0, multiple=True)
    found = {known.name: known for known in await broker.queues()}
    assert found[queue.name].max_attempts == 77
    assert found.keys() == pages.keys()
    async with asyncio.timeout(10):
        while foreign.queue_declare(topology.REGISTER, passive=True).method.message_count != 1:
            await asyncio.sleep(0.01)


# --- leases and attempts ---------------------------------------------------------------------------------------------


async def test_a_lease_ends_with_its_connection(url, rabbitmq, broker, queue) -> None:
    await broker.send_to_queue(queue, 1)
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as far:
            lost = await received(far, queue)
            proxy.reset()
            again = await received(broker, queue)
            assert (again.id, again.attempt) == (lost.id, 2)
            for settle in (lost.ack, lost.nack, lost.reject, lost.release):
                with pytest.raises(filao.LeaseLost, match="connection"):
                    await settle()
            with pytest.raises(filao.LeaseLost):
                await lost.extend(5)
            assert (await far.stats(queue)).leased == 0
            await again.ack()
            assert await far.receive_from_queue(queue, wait=0) is None


async def test_consumers_that_vanish_use_up_the_attempts(url, queue) -> None:
    queue = filao.Queue(queue.name, backoff=AT_ONCE, max_attempts=2)
    async with filao.connect(url) as broker:
        await broker.declare(queue)
        await broker.send_to_queue(queue, "kills everybody")
    for attempt in (1, 2):
        async with filao.connect(url) as broker:
            assert (await received(broker, queue)).attempt == attempt
    async with filao.connect(url) as broker:
        assert await broker.receive_from_queue(queue, wait=1) is None
        (dead,) = await broker.dead_letters(queue)
    assert (dead.reason, dead.attempts) == ("max_attempts", 2)


async def test_a_dead_letter_says_why(broker, queue) -> None:
    await broker.send_to_queue(queue, 1, headers={"a": "b"})
    await broker.send_to_queue(queue, 2, ttl=0.2)
    await (await received(broker, queue)).reject(ValueError("no such policy"))
    async with asyncio.timeout(10):
        while (await broker.stats(queue)).dead < 2:
            await asyncio.sleep(0.01)
    first, second = await broker.dead_letters(queue)
    assert (first.body, first.reason, first.headers, first.attempts) == (1, "rejected", {"a": "b"}, 1)
    assert "ValueError: no such policy" in first.error
    assert (second.body, second.reason) == (2, "expired")
    assert first.at <= second.at
    assert [letter.body for letter in await broker.dead_letters(queue, after=first.id)] == [2]
    assert [letter.body for letter in await broker.dead_letters(queue, limit=1)] == [1]
    assert [letter.body for letter in await broker.dead_letters(queue)] == [1, 2]  # looking has changed nothing


async def test_a_redrive_ends_though_everything_dies_again(url, broker, queue) -> None:
    async def reject() -> None:
        async with filao.connect(url) as other:
            async for message in other.consume(queue):
                await message.reject("not today")

    rejecting = asyncio.create_task(reject())
    await broker.send_many(queue, range(3))
    async with asyncio.timeout(20):
        while (await broker.stats(queue)).dead < 3:
            await asyncio.sleep(0.01)
        for _ in range(10):
            assert await broker.redrive(queue) <= 3
    rejecting.cancel()
    await asyncio.wait([rejecting])  # or the loop ends while it closes its connections, which takes the client 10 s


async def test_nothing_lies_where_nobody_works_on_it(url, broker, queue) -> None:
    async with filao.connect(url) as other:
        await broker.send_many(queue, range(10))
        held = await received(other, queue)
        rest = await broker.receive_many(queue, 10, wait=10)
        while len(rest) < 9:
            rest += await broker.receive_many(queue, 10, wait=10)
        assert sorted(message.body for message in rest) == sorted(set(range(10)) - {held.body})


async def test_what_was_pushed_to_a_caller_who_left_goes_to_another(url, broker, queue, monkeypatch) -> None:
    monkeypatch.setattr(consumer, "LINGER", 0.0)
    async with filao.connect(url) as other:
        assert await other.receive_from_queue(queue, wait=0.05) is None
        await broker.send_to_queue(queue, 1)
        assert (await received(broker, queue)).body == 1


async def test_what_comes_after_a_receive_that_waited_in_vain_uses_no_attempt(url, broker, queue, monkeypatch) -> None:
    """It was pushed to nobody, and given back a second later: with a single attempt, that was its death."""
    monkeypatch.setattr(consumer, "LINGER", 0.0)
    once = filao.Queue(f"{queue.name}.once", max_attempts=1, backoff=AT_ONCE)
    await broker.declare(once)
    async with filao.connect(url) as other:
        assert await other.receive_from_queue(once, wait=0.05) is None
        await broker.send_to_queue(once, 1)
        assert (await broker.stats(once)).ready == 1
        message = await received(broker, once)
        assert (message.body, message.attempt) == (1, 1)
        await message.ack()


@pytest.fixture
def once(queue) -> filao.Queue:
    """Return a queue in which a second attempt is death."""
    return filao.Queue(f"{queue.name}.once", max_attempts=1, backoff=AT_ONCE)


async def _is_pushed_to(broker: filao.Broker, queue: filao.Queue) -> consumer.Consumer:
    """Wait until the server may push messages of a queue to a broker, and return what receives them there."""
    async with asyncio.timeout(60):
        consumers: dict[str, consumer.Consumer] = engine_of(broker)._consumers
        while queue.name not in consumers or not consumers[queue.name].has_room():
            await asyncio.sleep(0.01)
    return consumers[queue.name]


async def test_what_comes_after_a_receive_that_was_cancelled_uses_no_attempt(url, broker, once, monkeypatch) -> None:
    """As when a worker is told to stop, or its only place is taken by another queue's message."""
    monkeypatch.setattr(consumer, "LINGER", 0.0)
    await broker.declare(once)
    async with filao.connect(url) as other:
        waiting = asyncio.create_task(other.receive_from_queue(once))
        receiving = await _is_pushed_to(other, once)
        waiting.cancel()
        async with asyncio.timeout(20):
            while receiving.has_room():
                await asyncio.sleep(0.01)
        await broker.send_to_queue(once, 1)
        message = await received(broker, once)
        assert (message.body, message.attempt) == (1, 1)
        await message.ack()


async def test_what_waits_behind_a_worker_that_stops_uses_no_attempt(url, broker, once, monkeypatch) -> None:
    """Each ack of its last handlers let the server push one more, which then went back."""
    monkeypatch.setattr(consumer, "LINGER", 3600.0)
    await broker.declare(once)
    await broker.send_many(once, range(4))
    theirs = filao.connect(url)
    worker, at_work, may_end = filao.Worker(theirs), [], asyncio.Event()

    @worker.consumer(once, concurrency=2)
    async def handle(message: filao.Message) -> None:
        at_work.append(message.body)
        await may_end.wait()

    async with running(worker) as run:
        await until(lambda: len(at_work) == 2)
        receiving: consumer.Consumer = engine_of(theirs)._consumers[once.name]
        worker.stop()
        await until(lambda: not receiving._room)
        may_end.set()
        await run
    left = [await received(broker, once) for _ in range(2)]
    assert [(message.body, message.attempt) for message in left] == [(2, 1), (3, 1)]
    assert sorted(at_work) == [0, 1]


async def test_what_waits_for_a_place_that_another_queue_has_uses_no_attempt(
    url, broker, queue, once, monkeypatch
) -> None:
    """What was pushed in the place of its last message waited for that place, and went back after a second."""
    monkeypatch.setattr(consumer, "LINGER", 3600.0)
    await broker.declare(once)
    theirs = filao.connect(url)
    worker, attempts, may_end = filao.Worker(theirs, concurrency=1), [], asyncio.Event()

    @worker.consumer(queue)
    @worker.consumer(once)
    async def handle(message: filao.Message) -> None:
        attempts.append((message.body, message.attempt))
        await may_end.wait()

    async with running(worker):
        receiving = await _is_pushed_to(theirs, once)
        await broker.send_to_queue(once, 1)
        await until(lambda: attempts and not receiving._room)
        await broker.send_to_queue(once, 2)
        may_end.set()
        await until(lambda: len(attempts) == 2)
    assert attempts == [(1, 1), (2, 1)]


async def test_a_first_receive_ends_whenever_it_is_cancelled(url, queue, broker) -> None:
    async with filao.connect(url) as fresh:
        receiving = [asyncio.create_task(fresh.receive_from_queue(queue.name)) for _ in range(40)]
        for task in receiving:  # they come after one another, so each is met somewhere else
            await asyncio.sleep(0.005)
            task.cancel()
        async with asyncio.timeout(60):
            ended = await asyncio.gather(*receiving, return_exceptions=True)
    assert [end for end in ended if not isinstance(end, asyncio.CancelledError)] == []


async def test_fewer_callers_are_pushed_less(broker, queue) -> None:
    await broker.send_many(queue, range(200))
    many = await broker.receive_many(queue, 100, wait=1)
    while len(many) < 100:
        many += await broker.receive_many(queue, 100 - len(many), wait=1)
    for message in many:
        await message.ack()
    async with asyncio.timeout(20):
        while (await broker.stats(queue)).ready < 90:  # the rest of what was pushed was given back
            await asyncio.sleep(0.05)
    left = [await received(broker, queue) for _ in range(100)]
    assert sorted(message.body for message in left) == list(range(100, 200))


async def test_callers_who_wait_while_others_hold_messages_are_pushed_to(broker, queue, monkeypatch) -> None:
    monkeypatch.setattr(engine, "TIDY_INTERVAL", 0.0)
    await broker.send_to_queue(queue, 0)
    held = await received(broker, queue)
    waiting = [asyncio.create_task(broker.receive_from_queue(queue)) for _ in range(9)]
    async with asyncio.timeout(20):
        while engine_of(broker)._lines[queue.name].wanted() < 9:
            await asyncio.sleep(0.01)
        await broker.send_to_queue(queue, 1)
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for _ in range(3):  # of which the second finds that callers hold less than may be pushed to those who wait
            await engine_of(broker)._tidy()
        await broker.send_to_queue(queue, 2)
        while sum(one.done() for one in waiting) < 2:
            await asyncio.wait([one for one in waiting if not one.done()], return_when=asyncio.FIRST_COMPLETED)
    await held.ack()
    for one in waiting:
        one.cancel()


async def test_those_who_wait_are_pushed_to_again_when_the_server_closed_their_channel(broker, queue) -> None:
    """As it does when somebody holds a message for longer than its consumer_timeout."""
    await broker.send_to_queue(queue, 0)
    held = await received(broker, queue)
    waiting = asyncio.create_task(broker.receive_from_queue(queue))
    async with asyncio.timeout(20):
        receiving = engine_of(broker)._consumers[queue.name]
        while not any(receiving._room.values()):
            await asyncio.sleep(0.01)
        await receiving.channel.basic_ack(1_000_000)  # which the server takes for a fault of that channel
        assert (await waiting).body == 0
    with pytest.raises(filao.LeaseLost):
        await held.ack()


async def test_leases_end_when_the_server_says_that_it_pushes_no_more_to_one_of_their_consumers(broker, queue) -> None:
    """As it does since 4.3 when a message was held for too long; its ack would be passed over while others have it."""
    await broker.send_many(queue, range(2))
    held = [await broker.receive_from_queue(queue) for _ in range(2)]
    waiting = asyncio.create_task(broker.receive_from_queue(queue))
    async with asyncio.timeout(20):
        receiving = engine_of(broker)._consumers[queue.name]
        while not any(receiving._room.values()):
            await asyncio.sleep(0.01)
        await receiving.channel._on_cancel_frame(spec.Basic.Cancel(next(iter(receiving._room)), nowait=True))
        for message in held:
            with pytest.raises(filao.LeaseLost, match="consumer_timeout"):
                await message.ack()
        assert (await waiting).body == 0
        assert (await received(broker, queue)).body == 1


async def test_what_was_acked_before_the_work_is_not_handled_when_the_server_took_it_back_first(
    broker, queue, monkeypatch
) -> None:
    """Its ack is passed over then, though the server answers what is asked behind it."""
    await broker.send_to_queue(queue, 1)
    message = delivery_of(await received(broker, queue))
    receiving, closing = engine_of(broker)._consumers[queue.name], asyncio.Event()
    monkeypatch.setattr(receiving.channel, "close", closing.wait)
    async with receiving._asking:
        settle = Settle(message, Ack(before_work=True))
        settling = asyncio.create_task(engine_of(broker)._settles.settle(queue, settle))
        while receiving.held:
            await asyncio.sleep(0)
        await receiving.channel._on_cancel_frame(spec.Basic.Cancel("filao.1.0", nowait=True))
    with pytest.raises(filao.LeaseLost, match="consumer_timeout"):
        await settling
    closing.set()


async def test_what_is_held_for_longer_than_the_servers_consumer_timeout_loses_its_lease(rabbitmq, url, queue) -> None:
    """A server before 4.3 ends the channel; a younger one only says that it pushes no more."""

    async def limit(held: int, looked_at: int) -> None:
        settings = {"consumer_timeout": held, "channel_tick_interval": looked_at}
        setting = ", ".join(f"application:set_env(rabbit, {name}, {value})" for name, value in settings.items())
        await asyncio.to_thread(rabbitmq.command, "eval", f"{setting}.")

    await limit(2_000, 500)
    try:
        async with filao.connect(url) as holder, filao.connect(url) as other:
            await holder.declare(queue)
            holding = asyncio.create_task(holder.receive_from_queue(queue))
            async with asyncio.timeout(60):
                while not engine_of(holder)._wanted(queue.name):  # so that it is pushed to
                    await asyncio.sleep(0.01)
                await holder.send_to_queue(queue, "slow")
                held = await holding
                again = await other.receive_from_queue(queue)
                while engine_of(holder)._consumers[queue.name].is_open:
                    await asyncio.sleep(0.01)
            with pytest.raises(filao.LeaseLost, match="consumer_timeout"):
                await held.ack()
            await again.ack()
    finally:
        await limit(1_800_000, 60_000)


async def test_what_a_look_took_that_is_cut_off_waits_for_the_next(broker, queue, monkeypatch) -> None:
    monkeypatch.setattr(consumer, "LINGER", 3600.0)
    await broker.send_to_queue(queue, 0)
    await (await received(broker, queue)).ack()
    receiving = engine_of(broker)._consumers[queue.name]
    await receiving.take(1, 1)  # lets the server push one
    await broker.send_to_queue(queue, 1)
    async with asyncio.timeout(20):
        while not receiving._buffer:
            await asyncio.sleep(0.01)
    async with receiving._asking:  # as while it is tidied up
        looking = asyncio.create_task(receiving.take(1, 2))
        while receiving._buffer:
            await asyncio.sleep(0)
        looking.cancel()
        await asyncio.wait([looking])
    assert (await received(broker, queue)).body == 1


async def test_what_was_acked_before_the_work_is_held_no_more_though_nobody_confirms_it(broker, queue) -> None:
    """Acked once more, it would end the channel and with it all leases of its queue."""
    await broker.send_to_queue(queue, 1)
    message = delivery_of(await received(broker, queue))
    receiving = engine_of(broker)._consumers[queue.name]
    async with receiving._asking:
        settling = asyncio.create_task(engine_of(broker)._settles.settle(queue, Settle(message, Ack(before_work=True))))
        while receiving.held:
            await asyncio.sleep(0)
        settling.cancel()
        await asyncio.wait([settling])
    assert not receiving.held


async def test_delays_climb_down_the_ladder(url, queue) -> None:
    slow = filao.Queue(queue.name, emulate=("delay",), backoff=filao.Backoff(first=0.3, factor=2, jitter=0))
    async with filao.connect(url) as broker:
        await broker.declare(slow)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await broker.send_to_queue(slow, "later", delay=1.3)
        await broker.send_to_queue(slow, "too late", delay=0.5, ttl=0.2)
        await broker.send_to_queue(slow, "now")
        message = await received(broker, slow)
        assert message.body == "now"
        await message.nack(reason="again")
        message = await received(broker, slow)
        assert (message.body, message.attempt) == ("now", 2)
        assert loop.time() - began >= 0.3
        await message.ack()
        message = await received(broker, slow)
        assert (message.body, message.attempt) == ("later", 1)
        assert loop.time() - began >= 1.3
        (dead,) = await broker.dead_letters(slow)
        assert (dead.body, dead.reason) == ("too late", "expired")
        with pytest.raises(filao.ConfigurationError, match="seconds"):
            await broker.send_to_queue(slow, 1, delay=topology.DELAY_MAX + 1)


@pytest.mark.parametrize(
    ("delay", "step", "bits"), [(0.01, "filao.delay.00", 1), (0.1, "filao.delay.00", 1), (1.3, "filao.delay.03", 13)]
)
def test_a_route_spells_the_delay_in_binary(delay: float, step: str, bits: int) -> None:
    exchange, key = topology.route("claims.processing", delay)
    assert exchange == step
    assert key == ".".join(f"{bits:028b}") + ".claims.processing"
    assert topology.route("claims", 0) == ("", "claims")


async def test_a_worker_works_here(url, queue) -> None:
    worker = filao.Worker(url)
    handled: list[Any] = []

    @worker.consumer(queue, concurrency=4, outcomes={KeyError: filao.Reject("no such claim")})
    async def handle(message: filao.Message) -> None:
        handled.append((message.body, message.attempt))
        if message.body == "fails once" and message.attempt == 1:
            raise ValueError
        if message.body == "unknown":
            raise KeyError

    async with filao.connect(url) as broker:
        await broker.declare(queue)
        await broker.send_many(queue, ["fine", "fails once", "unknown"])
        ready = asyncio.Event()
        running = asyncio.create_task(worker.run(ready=ready.set))
        async with asyncio.timeout(20):
            while len(handled) < 4 or (await broker.stats(queue)).dead < 1:
                await asyncio.sleep(0.01)
        worker.stop()
        await running
        (dead,) = await broker.dead_letters(queue)
        assert await broker.receive_from_queue(queue, wait=0) is None
    assert sorted(handled) == [("fails once", 1), ("fails once", 2), ("fine", 1), ("unknown", 1)]
    assert (dead.body, dead.reason) == ("unknown", "rejected")


async def test_a_handler_for_which_no_thread_can_be_started_uses_no_attempt(url, broker, queue, caplog) -> None:
    """A release would use it: so the message is kept until a thread can be had."""
    worker, attempts = filao.Worker(url), []

    @worker.consumer(queue)
    def handle(message: filao.sync.Message) -> None:
        attempts.append(message.attempt)

    async with running(worker):
        before = threading.stack_size(2**62)  # more than there is
        try:
            await broker.send_to_queue(queue, 7)
            await until(lambda: "cannot start a thread" in caplog.text)
        finally:
            threading.stack_size(before)
        await until(lambda: attempts)
    assert attempts == [1]


async def test_a_move_that_is_cut_off_leaves_the_messages_in_order(broker, queue) -> None:
    await broker.send_many(queue, range(200))
    async with engine_of(broker).mover.packing(queue.name) as packing:
        assert await packing.take(1_000)
    async with asyncio.timeout(20):
        while (await broker.stats(queue)).ready < 200:
            await asyncio.sleep(0.02)
    assert [message.body for message in await broker.receive_many(queue, 200, wait=0)] == list(range(200))


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frail(tmp_path_factory, rabbitmq) -> Iterator[Rabbitmq]:
    """Return a server that tests may crash; `rabbitmq` skips it where none is installed."""
    with rabbitmq_server(tmp_path_factory.mktemp("frail") / "server") as server:
        yield server


@pytest.fixture
def hardy(queue: filao.Queue) -> filao.Queue:
    """Return a queue whose messages survive any number of attempts."""
    return filao.Queue(queue.name, backoff=AT_ONCE, max_attempts=1_000)


async def test_a_crash_of_the_server_loses_nothing(frail, hardy) -> None:
    async with filao.connect(frail.url()) as senders:
        await senders.declare(hardy)
        async with filao.connect(frail.url()) as consumers, loaded(senders, consumers, queue=hardy) as load:
            await load.resumes()
            for _ in range(2):
                await asyncio.to_thread(frail.crash)
                await asyncio.to_thread(frail.start)
                await load.resumes()
        await load.finish(senders)
    assert load.errors["EngineUnavailable"]
    assert load.lost == set()


async def test_connections_that_are_reset_lose_nothing(frail, hardy) -> None:
    with closing(Proxy(frail.port)) as proxy:
        async with filao.connect(frail.url()) as near:
            await near.declare(hardy)
            async with filao.connect(frail.url(proxy.port)) as far, loaded(far, far, queue=hardy) as load:
                for _ in range(4):  # pauses grow: ten in a row, which `tests/chaos` does, take four times as long
                    await load.resumes()
                    proxy.reset()
                await load.resumes()
            await load.finish(near)
    assert load.lost == set()


async def test_a_network_that_stalls_is_given_up_and_found_again(frail, hardy, monkeypatch) -> None:
    monkeypatch.setattr(engine, "ANSWERS_WITHIN", 1.0)
    monkeypatch.setattr(engine, "BEGUN_WITHIN", 1.0)
    with closing(Proxy(frail.port)) as proxy:
        async with filao.connect(frail.url()) as near:
            await near.declare(hardy)
            async with filao.connect(frail.url(proxy.port)) as far, loaded(far, far, queue=hardy) as load:
                await load.resumes()
                proxy.stall()
                async with asyncio.timeout(30):
                    while not load.errors["EngineUnavailable"]:
                        await asyncio.sleep(0.01)
                proxy.go_on()
                await load.resumes()
            await load.finish(near)
    assert load.lost == set()


async def test_a_queue_more_than_the_server_allows_channels_is_refused_and_costs_no_lease(broker, queue) -> None:
    others = [filao.Queue(f"{queue.name}.{number}", backoff=AT_ONCE) for number in range(2)]
    await broker.declare(*others)
    for each in (queue, *others):
        await broker.send_to_queue(each, 1)
    session = await engine_of(broker)._receiving.session()
    assert session._channels_max == 2047  # as this server comes
    session._channels_max = 2  # asked for one more, a server would end the connection
    held = [await received(broker, queue), await received(broker, others[0])]
    with pytest.raises(filao.ConfigurationError, match="allows 2 channels"):
        await broker.receive_from_queue(others[1], wait=0)
    for message in held:
        await message.ack()


async def test_few_queues_have_a_channel_of_their_own_and_the_others_share_one(broker, queue) -> None:
    queues = [queue, *(filao.Queue(f"{queue.name}.{number}", backoff=AT_ONCE) for number in range(4))]
    await broker.declare(*queues)
    session = await engine_of(broker)._sending.session()
    session._channels_max = server.FREE_MIN + 2
    for body in range(2):
        for each in queues:
            await broker.send_to_queue(each, body)
    assert len(session._channels) == 3
    for each in queues:
        assert [message.body for message in await broker.receive_many(each, 2, wait=0)] == [0, 1]


async def test_large_bodies_take_turns_at_a_bounded_number_of_channels(broker, queue) -> None:
    session = await engine_of(broker)._sending.session()
    channels = session._connection.transport.connection.channels
    sending = asyncio.gather(*(broker.send_to_queue(queue, b"x" * 150_000) for _ in range(3 * LARGE_AT_ONCE // 2)))
    most = 0
    while not sending.done():
        most = max(most, len(channels))
        await asyncio.sleep(0)
    await sending
    assert 1 < most <= LARGE_AT_ONCE + 1  # and that of the others


async def test_an_operators_call_waits_for_no_farewell_of_a_server_that_stalls(frail, queue, monkeypatch) -> None:
    with closing(Proxy(frail.port)) as proxy:
        async with filao.connect(frail.url(proxy.port)) as far, asyncio.timeout(20):
            await far.declare(queue)
            monkeypatch.setattr(server, "CONNECTED_WITHIN", 3600.0)

            async def look() -> None:
                async with engine_of(far)._declared.apart() as call:
                    monkeypatch.setattr(server, "ANSWERS_WITHIN", 0.3)
                    proxy.stall()
                    await call.session.depth(queue.name)

            with pytest.raises(filao.EngineUnavailable, match="has not answered"):
                await look()
            proxy.go_on()


@pytest.mark.parametrize(
    "call",
    [
        lambda broker, queue: broker.stats(queue),
        lambda broker, queue: broker.dead_letters(queue),
        lambda broker, queue: broker.redrive(queue),
        lambda broker, queue: broker.discard(queue, ids=["1"]),
        lambda broker, queue: broker.purge(queue),
        lambda broker, queue: broker.delete_queue(queue),
    ],
    ids=["stats", "dead letters", "redrive", "discard", "purge", "delete"],
)
async def test_an_operators_call_needs_one_connection(rabbitmq, broker, queue, monkeypatch, call) -> None:
    monkeypatch.setattr(engine, "LEARN_INTERVAL", 3600.0)
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as far:
            unheard_of = filao.Queue(f"{queue.name}.new", backoff=AT_ONCE)  # so its rules must be read
            await broker.declare(unheard_of)
            before = proxy.accepted
            await call(far, unheard_of.name)
            assert proxy.accepted - before == 1


async def test_callers_who_come_together_learn_of_a_queue_in_one_look(rabbitmq, broker, queue, monkeypatch) -> None:
    monkeypatch.setattr(engine, "LEARN_INTERVAL", 3600.0)
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as far:
            before = proxy.accepted
            sending = [asyncio.create_task(far.send_to_queue(queue.name, number)) for number in range(64)]
            while proxy.accepted == before:  # the look has begun
                await asyncio.sleep(0)
            sending[0].cancel()
            results = await asyncio.gather(*sending, return_exceptions=True)
            assert proxy.accepted - before == 2  # the look, and the connection of those who send
    assert [type(result) for result in results] == [asyncio.CancelledError] + [filao.Receipt] * 63


async def test_an_operators_call_has_one_limit_for_all_its_answers(rabbitmq, broker, queue, monkeypatch) -> None:
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as far:
            monkeypatch.setattr(register, "ANSWERS_WITHIN", 1.0)
            proxy.delay = 0.2  # each answer is well in time, all together are not
            with pytest.raises(filao.EngineUnavailable, match="has not answered"):
                await far.delete_queue(queue)
            proxy.delay = 0.0
    assert queue.name in {known.name for known in await broker.queues()}


async def test_a_broker_that_is_closed_while_the_network_stalls_leaves_no_task(rabbitmq, queue, monkeypatch) -> None:
    monkeypatch.setattr(session, "CLOSES_WITHIN", 1.0)
    monkeypatch.setattr(engine, "ANSWERS_WITHIN", 2.0)
    monkeypatch.setattr(server.Link.close, "__defaults__", (0.3,))
    before = len(asyncio.all_tasks())
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as far:
            await far.declare(queue)
            await far.send_to_queue(queue, 0)
            proxy.stall()
            sending = [asyncio.create_task(far.send_to_queue(queue, b"x" * 100_000)) for _ in range(200)]
            writer = next(one for one in engine_of(far)._server._sockets._writers if not one.is_closing())
            while not writer.transport.get_write_buffer_size():
                await asyncio.sleep(0.01)
            with suppress(filao.EngineUnavailable):  # it took longer
                await far.close()
        for one in sending:
            one.cancel()
        async with asyncio.timeout(20):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.01)


CONFIRM = b"\x00\x3c\x00\x50"  # basic.ack


async def test_a_confirm_that_is_lost_leaves_the_sender_in_doubt_and_the_message_stored(frail, queue) -> None:
    with closing(Proxy(frail.port)) as proxy:
        async with filao.connect(frail.url(proxy.port)) as far, filao.connect(frail.url()) as near:
            await near.declare(queue)
            await far.send_to_queue(queue, 0)
            proxy.swallow(b"claim-1", CONFIRM)
            with pytest.raises(filao.EngineUnavailable, match="send it again with the same message_id"):
                await far.send_to_queue(queue, 1, message_id="claim-1")
            assert proxy.swallowed.is_set()
            await far.send_to_queue(queue, 1, message_id="claim-1")
            found = [await received(near, queue) for _ in range(3)]
    assert [(message.body, message.id) for message in found[1:]] == [(1, "claim-1")] * 2  # doubled, and both can tell


async def test_what_begins_when_its_time_is_over_is_done_and_costs_no_lease(broker, queue) -> None:
    other = filao.Queue(f"{queue.name}.other", backoff=AT_ONCE)  # which takes a channel of its own: so the look waits
    await broker.declare(other)
    await broker.send_to_queue(queue, 0)
    await broker.send_to_queue(other, 1)
    held = await received(broker, queue)
    long_ago = asyncio.get_running_loop().time() - server.ANSWERS_WITHIN
    look: list[Operation] = [Receive(other.name, 1)]
    (found,) = await engine_of(broker).execute(Batch(True, False, lambda _: look, long_ago))
    assert len(found.deliveries) == 1
    await held.ack()


@contextmanager
def without_memory(server: Rabbitmq) -> Generator[None]:
    """Let a server have no room: it hears nothing from those who send, and serves all others.

    It tells its connections after it has answered the command, so one of our own waits to be told.
    """
    blocked: list[object] = []
    with closing(pika.BlockingConnection(pika.URLParameters(server.url()))) as probe:
        probe.add_on_connection_blocked_callback(lambda *told: blocked.extend(told))
        server.command("set_vm_memory_high_watermark", "0.000001")
        try:
            probe.channel().basic_publish("", "nobody", b"")  # only those who send are told
            while not blocked:
                probe.process_data_events(20)
            yield
        finally:
            server.command("set_vm_memory_high_watermark", "0.4")


async def test_a_server_that_blocks_senders_lets_consumers_finish_and_costs_no_lease(
    frail, queue, monkeypatch, caplog
) -> None:
    spent = filao.Queue(f"{queue.name}.spent", backoff=AT_ONCE, emulate=("delay",))
    monkeypatch.setattr(RabbitmqEngine, "concurrent_batches", 1)  # so that the next in its line must wait for the send
    async with filao.connect(frail.url()) as broker:
        await broker.declare(queue)
        await broker.declare(spent)
        await broker.send_many(queue, [0, 1, 2])
        await broker.send_to_queue(spent, "put off")
        put_off = await received(broker, spent)
        with closing(pika.BlockingConnection(pika.URLParameters(frail.url()))) as foreign:
            tired = pika.BasicProperties(headers={"x-filao-attempt": 99})
            foreign.channel().basic_publish("", spent.name, b"7", tired)
        held = await received(broker, queue)
        with without_memory(frail):
            with monkeypatch.context() as patched:
                patched.setattr(engine, "ANSWERS_WITHIN", 1.0)
                patched.setattr(engine, "BEGUN_WITHIN", 1.0)
                sending = asyncio.gather(broker.send_to_queue(queue, 3), return_exceptions=True)
                await asyncio.sleep(0)
                message = await received(broker, queue)
                await message.ack()
                (error,) = await sending
                with pytest.raises(filao.EngineUnavailable, match="memory"):
                    await put_off.release(delay=60)
                assert await broker.receive_from_queue(spent, wait=0) is None
                async with asyncio.timeout(20):
                    while "cannot be made a dead letter (max_attempts)" not in caplog.text:
                        await asyncio.sleep(0.01)
            assert isinstance(error, filao.EngineUnavailable)
            assert "memory" in str(error)
            await held.ack()
        async with asyncio.timeout(60):
            while not await broker.dead_letters(spent):
                assert await broker.receive_from_queue(spent, wait=0) is None
        await broker.send_to_queue(queue, 4)
        bodies = []
        while 4 not in bodies:
            message = await received(broker, queue)
            bodies.append(message.body)
            await message.ack()
    assert 2 in bodies


async def test_a_queue_that_is_silent_costs_no_lease_in_others_and_leaves_no_send_to_them_in_doubt(
    rabbitmq, broker, queue, monkeypatch
) -> None:
    other = filao.Queue(f"{queue.name}.other", backoff=AT_ONCE)
    await broker.declare(other)
    await broker.send_many(other, [0, 1])
    held = await received(broker, other)
    async with silent(rabbitmq, queue.name):
        with monkeypatch.context() as patched:
            patched.setattr(engine, "ANSWERS_WITHIN", 1.0)
            patched.setattr(engine, "BEGUN_WITHIN", 1.0)
            with pytest.raises(filao.EngineUnavailable, match="has not answered"):
                await broker.receive_from_queue(queue, wait=0)
            await held.ack()
            held = await received(broker, other)
            sends = (broker.send_to_queue(to, 2) for to in (queue, other))
            in_doubt, sent = await asyncio.gather(*sends, return_exceptions=True)
    assert isinstance(in_doubt, filao.EngineUnavailable)
    assert isinstance(sent, filao.Receipt)
    await held.ack()


async def test_the_doctor_tells_that_the_server_blocks_those_who_send(frail, queue, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "BLOCKED_AFTER", 0.5)
    async with filao.connect(frail.url()) as broker:
        await broker.declare(queue)
        with without_memory(frail):
            findings = [finding for finding in await broker.doctor() if finding.level == "error"]
    assert [finding.subject for finding in findings] == ["server"]
    assert "blocks those who send" in findings[0].text


async def test_a_declaration_that_the_server_blocks_keeps_nobody_from_the_register(frail, queue, monkeypatch) -> None:
    """It waited to write while it held the register, which stayed with its connection: nobody else could open."""
    monkeypatch.setattr(register, "HELD_MAX", 2.0)
    new = filao.Queue(f"{queue.name}.new", backoff=AT_ONCE)
    async with filao.connect(frail.url()) as broker:
        await broker.declare(queue)
        with without_memory(frail):
            with monkeypatch.context() as patched:
                patched.setattr(register, "ANSWERS_WITHIN", 1.0)
                for call in (broker.declare(new), broker.delete_queue(queue)):
                    with pytest.raises(filao.EngineUnavailable, match="memory"):
                        await call
            async with filao.connect(frail.url()) as other:
                assert queue in await other.queues()
                await other.declare(queue)  # nothing new need be written


async def test_the_doctor_waits_for_no_answer_longer_than_others(rabbitmq, broker, queue, monkeypatch) -> None:
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as far, asyncio.timeout(20):
            far_server = engine_of(far)._server
            async with engine_of(far)._declared.apart() as call:
                monkeypatch.setattr(doctor, "ANSWERS_WITHIN", 0.3)
                proxy.stall_at(b"x-dead-letter-routing-key")  # in the midst of the look at a queue
                finding = await doctor._queue(call.session, far_server, queue)
                proxy.go_on()
    assert finding.level == "error"
    assert "has not answered" in finding.text


async def test_what_is_moved_to_a_server_without_memory_is_refused_in_time(frail, queue, monkeypatch) -> None:
    monkeypatch.setattr(engine, "ANSWERS_WITHIN", 1.0)
    monkeypatch.setattr(engine, "BEGUN_WITHIN", 1.0)
    async with filao.connect(frail.url()) as broker:
        await broker.declare(queue)
        await broker.send_to_queue(queue, 1)
        mover = engine_of(broker).mover
        async with mover.packing(queue.name) as packing:
            parcels = await packing.take(1)
        with without_memory(frail):
            async with asyncio.timeout(20):
                with pytest.raises(filao.EngineUnavailable, match="memory"):
                    await mover.unpack(queue.name, parcels)
        assert (await received(broker, queue)).body == 1


async def test_what_cannot_be_buried_yet_keeps_nobody_from_working_on_its_queue(frail, queue) -> None:
    other = filao.Queue(f"{queue.name}.other", backoff=AT_ONCE)
    async with filao.connect(frail.url()) as broker:
        await broker.declare(queue, other)
        await broker.send_many(other, [0, 1])
        held, kept = await broker.receive_many(other, 2, wait=0)
        with closing(pika.BlockingConnection(pika.URLParameters(frail.url()))) as foreign:
            channel = foreign.channel()
            channel.confirm_delivery()
            channel.basic_publish("", queue.name, b'"spent"', pika.BasicProperties(headers={"x-filao-attempt": 99}))
            channel.basic_publish("", queue.name, b'"alive"')
        with without_memory(frail):
            async with asyncio.timeout(20):  # a confirm is waited for longer
                looking = asyncio.create_task(broker.receive_from_queue(queue))
                await asyncio.sleep(0)  # so that the look comes first into a batch that all three share
                await asyncio.gather(held.ack(), kept.extend(60))
                message = await looking
        assert message is not None
        assert (message.body, message.attempt) == ("alive", 1)
        await message.ack()
        await kept.ack()
        async with asyncio.timeout(60):
            while not (letters := await broker.dead_letters(queue)):
                await asyncio.sleep(0.05)
        assert [(letter.body, letter.reason) for letter in letters] == [("spent", "max_attempts")]
        assert await broker.receive_from_queue(other, wait=0) is None


async def test_a_worker_goes_on_after_a_crash_of_the_server(frail, queue) -> None:
    worker = filao.Worker(frail.url())
    handled: list[int] = []

    @worker.consumer(queue, concurrency=4)
    async def handle(message: filao.Message) -> None:
        handled.append(message.body)

    ready = asyncio.Event()
    running = asyncio.create_task(worker.run(ready=ready.set))
    async with asyncio.timeout(90):
        await ready.wait()
        await asyncio.to_thread(frail.crash)
        await asyncio.to_thread(frail.start)
        async with filao.connect(frail.url()) as broker:
            await broker.send_to_queue(queue, 7)
        while not handled:
            await asyncio.sleep(0.01)
        worker.stop()
        await running
    assert handled == [7]


async def test_a_cluster_of_three_loses_a_node_and_nothing_else(tmp_path_factory, rabbitmq, hardy) -> None:
    with rabbitmq_cluster(tmp_path_factory.mktemp("cluster") / "nodes", 3) as nodes:
        ports = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        url = f"amqp://guest:guest@{ports}/"
        async with filao.connect(url) as senders:
            await senders.declare(hardy)
            async with filao.connect(url) as consumers, loaded(senders, consumers, queue=hardy) as load:
                await load.resumes()
                await asyncio.to_thread(nodes[0].crash)  # which leads the queue, and has all our connections
                await load.resumes()
                await asyncio.to_thread(nodes[0].start)
                await load.resumes()
                await asyncio.to_thread(nodes[1].crash)
                await load.resumes()
            await load.finish(senders)
    assert load.errors["EngineUnavailable"]
    assert load.lost == set()


async def test_the_doctor_names_no_message_as_the_cause_when_most_nodes_are_away(
    tmp_path_factory, rabbitmq, queue, monkeypatch
) -> None:
    """It told to delete a queue, and to restart the node."""
    monkeypatch.setattr(register, "ANSWERS_WITHIN", 5.0)
    with rabbitmq_cluster(tmp_path_factory.mktemp("few") / "nodes", 2) as nodes:
        async with filao.connect(nodes[0].url()) as broker:
            await broker.declare(queue)
            await asyncio.to_thread(nodes[1].crash)
            findings = {finding.subject: finding for finding in await broker.doctor()}
    assert findings["expiry"].level == "error"
    assert "cluster_status" in findings["expiry"].text
    assert "x-death" not in findings["expiry"].text


def test_what_it_can_do_is_said() -> None:
    assert Feature.FENCING not in RabbitmqEngine.features
    assert not RabbitmqEngine.features & RabbitmqEngine.emulated
    assert engine_of(filao.connect("amqp://127.0.0.1/")).emulated == {Feature.DELAY}


async def test_its_stats_tell_what_it_knows_and_name_what_it_does_not(url, broker, queue) -> None:
    await broker.send_many(queue, range(3))
    await (await received(broker, queue)).reject("torn")
    held = await received(broker, queue)
    async with asyncio.timeout(30):
        while ((stats := await broker.stats(queue)).ready, stats.leased, stats.dead) != (1, 1, 1):
            await asyncio.sleep(0.05)
    assert (stats.sent, stats.dead_by_reason, stats.receivers, stats.oldest_ready_age) == (0, {}, (), None)
    program = [sys.executable, "-m", "filao", "stats", url, queue.name]
    told = await asyncio.to_thread(subprocess.run, program, capture_output=True, text=True, timeout=60)
    assert (json.loads(told.stdout)["ready"], json.loads(told.stdout)["dead"]) == (1, 1)
    for unknown in ("RabbitMQ", "delayed", "blocked", "held by others", "ages", "reasons", "paused", "who receives"):
        assert unknown in told.stderr
    await held.ack()


# --- several operators at once ---------------------------------------------------------------------------------------


async def _dies(broker: filao.Broker, queue: filao.Queue, number: int) -> None:
    """Let so many messages die."""
    for body in range(number):
        await broker.send_to_queue(queue, body)
    await _die(broker, queue, number)


async def _die(broker: filao.Broker, queue: filao.Queue, number: int) -> None:
    for _ in range(number):
        await (await received(broker, queue)).reject("no")
    async with asyncio.timeout(60):
        while (await broker.stats(queue)).dead < number:
            await asyncio.sleep(0.05)


async def test_each_of_several_operators_has_all_dead_letters(broker, queue, url) -> None:
    """They are received to be looked at: two at a time would each see a part, and take it for all."""
    await _dies(broker, queue, 20)
    async with filao.connect(url) as other:
        looks = (one.dead_letters(queue) for one in (broker, other, broker))
        assert [len(found) for found in await asyncio.gather(*looks)] == [20, 20, 20]
        found = await asyncio.gather(other.dead_letters(queue), broker.redrive(queue))
        assert found[1] == 20
        await _die(broker, queue, 20)
        assert (await asyncio.gather(other.dead_letters(queue), broker.purge(queue, state="dead")))[1] == 20


async def _a_hundred_die(broker: filao.Broker, queue: filao.Queue, foreign: Any) -> None:
    for number in range(100):
        properties = pika.BasicProperties(message_id=str(number), headers={"x-filao-reason": "rejected"})
        foreign.basic_publish("", topology.dead_name(queue.name), b"1", properties)
    async with asyncio.timeout(60):
        while (await broker.stats(queue)).dead < 100:
            await asyncio.sleep(0.05)


async def test_dead_letters_keep_their_order_however_often_they_are_looked_at(broker, queue, foreign) -> None:
    await _a_hundred_die(broker, queue, foreign)
    for _ in range(2):
        assert [letter.id for letter in await broker.dead_letters(queue, limit=100)] == list(map(str, range(100)))
    assert await broker.redrive(queue, ids=["0", "50"]) == 2
    walked: list[str] = []
    while page := await broker.dead_letters(queue, limit=40, after=walked[-1] if walked else None):
        walked += [letter.id for letter in page]
    assert walked == [str(number) for number in range(100) if number not in (0, 50)]


async def test_a_step_that_redrives_the_first_takes_no_others(broker, queue, foreign) -> None:
    """Each of many steps took all there were: three redrives of 300 at a rate went on for minutes."""
    await _a_hundred_die(broker, queue, foreign)
    assert await broker.redrive(queue, ids=["0", "1"], limit=2) == 2
    assert await broker.redrive(queue, limit=28) == 28
    assert (await broker.stats(queue)).dead == 70
    method, properties, _ = foreign.basic_get(topology.dead_name(queue.name))
    assert (properties.message_id, method.redelivered) == ("30", False)
    foreign.basic_nack(method.delivery_tag)
    assert await broker.redrive(queue, ids=["31", "75"], limit=2) == 2
    kept = [letter.id for letter in await broker.dead_letters(queue, limit=100)]
    assert kept == [str(number) for number in range(30, 100) if number not in (31, 75)]


async def test_dead_letters_keep_their_order_though_a_look_at_them_is_cancelled(url, broker, queue, foreign) -> None:
    await _a_hundred_die(broker, queue, foreign)
    async with filao.connect(url) as other:

        def keep(letter: filao.StoredMessage) -> str:
            if letter.id == "50":
                looking.cancel()
            return letter.id

        operators = engine_of(other).operators
        looking = asyncio.create_task(operators.seen(queue.name, filao.State.DEAD, keep, limit=100))
        await asyncio.wait([looking])  # while the look has more than fifty of them; and the broker is closed
        assert looking.cancelled()
    assert [letter.id for letter in await broker.dead_letters(queue, limit=100)] == list(map(str, range(100)))


async def test_a_look_at_many_dead_letters_takes_few_calls(broker, queue, foreign, monkeypatch) -> None:
    """A round trip for each of two thousand took a busy server twenty seconds."""
    await _a_hundred_die(broker, queue, foreign)
    calls: list[str] = []
    rpc = Channel.rpc

    def counted(channel: Channel, frame: Any, timeout: Any = None) -> Any:
        calls.append(frame.name)
        return rpc(channel, frame, timeout)

    monkeypatch.setattr(Channel, "rpc", counted)
    assert len(await broker.dead_letters(queue, limit=100)) == 100
    assert calls.count("Basic.Consume") == 2
    assert "Basic.Get" not in calls


async def _letters(broker: filao.Broker, queue: filao.Queue, foreign: Any, *ids: str) -> None:
    """Let dead letters with these ids be there."""
    for one in ids:
        properties = pika.BasicProperties(message_id=one, headers={"x-filao-reason": "rejected"})
        foreign.basic_publish("", topology.dead_name(queue.name), b"1", properties)
    async with asyncio.timeout(60):
        while (await broker.stats(queue)).dead < len(ids):
            await asyncio.sleep(0.05)


async def test_letters_with_one_id_are_redriven_like_others(broker, queue, foreign) -> None:
    """What was sent twice dies twice: the second of them ended the redrive of all that lay behind."""
    await _letters(broker, queue, foreign, *"AABC")
    assert await broker.redrive(queue, ids=["A", "B"]) == 3
    assert [letter.id for letter in await broker.dead_letters(queue)] == ["C"]
    await _letters(broker, queue, foreign, *"AABC")
    assert await broker.redrive(queue) == 5
    assert (await broker.stats(queue)).ready == 8


async def test_a_redrive_to_a_queue_that_was_deleted_keeps_all_letters(broker, queue, foreign) -> None:
    await _letters(broker, queue, foreign, *"AAB")
    foreign.queue_delete(queue.name)
    with pytest.raises(filao.QueueNotFound, match=f"^queue '{queue.name}' was deleted on the server"):
        await broker.redrive(queue)
    assert [letter.id for letter in await broker.dead_letters(queue)] == ["A", "A", "B"]


async def test_new_headers_of_a_dead_letter_are_checked(broker, queue, foreign) -> None:
    """Of some names the server thinks something itself: it ended the channel, or sent copies elsewhere."""
    await _letters(broker, queue, foreign, "A")
    with pytest.raises(filao.MessageNotEncodable, match="'CC'"):
        await broker.redrive(queue, ids=["A"], body=1, headers={"CC": "claims"})
    assert (await broker.stats(queue)).dead == 1


async def test_a_move_takes_the_dead_letters_in_turn_with_operators(broker, queue, foreign, monkeypatch) -> None:
    """Each would see a part of them, and take it for all."""
    monkeypatch.setattr(control, "TAKEN_WITHIN", 0.1)
    foreign.queue_declare(topology.dead_name(queue.name) + control.TAKEN, exclusive=True)
    with pytest.raises(filao.EngineUnavailable, match="another program has had its dead letters"):
        async with engine_of(broker).mover.packing(queue.name):
            pass


@pytest.mark.parametrize("messages", [True, False])
async def test_a_queue_whose_dead_letters_somebody_keeps_loses_nothing_to_a_delete(
    broker, queue, foreign, monkeypatch, messages
) -> None:
    """While somebody looks at them, its dead letters are not there, and it seems empty."""
    monkeypatch.setattr(control, "TAKEN_WITHIN", 0.1)
    if messages:
        await broker.send_to_queue(queue, 1)
    foreign.queue_declare(topology.dead_name(queue.name) + control.TAKEN, exclusive=True)
    with pytest.raises(filao.EngineUnavailable, match="Nothing was done"):
        await broker.delete_queue(queue, messages=messages)
    await broker.send_to_queue(queue, 1)
    assert (await received(broker, queue)).body == 1


async def test_dead_letters_that_somebody_keeps_are_said_to_be_away(broker, queue, foreign, monkeypatch) -> None:
    monkeypatch.setattr(control, "TAKEN_WITHIN", 0.1)
    foreign.queue_declare(topology.dead_name(queue.name) + control.TAKEN, exclusive=True)
    for call in (broker.dead_letters(queue), broker.redrive(queue), broker.purge(queue, state="dead")):
        with pytest.raises(
            filao.EngineUnavailable, match=f"{queue.name}.*another program has had its dead letters"
        ) as no:
            await call
        assert "forget_cluster_node" in str(no.value)  # since 4.3 it may be a program that ended with its node


async def test_dead_letters_that_are_being_looked_at_are_counted(broker, queue) -> None:
    await _dies(broker, queue, 2)
    operators = engine_of(broker).operators
    async with (
        operators._declared.apart() as call,
        control._dead(call, queue.name, operators._taken, errands.Errand()) as look,
    ):
        async for _ in look.each():
            assert (await broker.stats(queue)).dead == 2
    assert (await broker.stats(queue)).dead == 2


async def test_a_look_ends_when_the_server_takes_the_dead_letters_back(broker, queue) -> None:
    """As it does since 4.3 with what was held for too long; what was deleted then counted, and was there still."""
    await _dies(broker, queue, 2)
    operators = engine_of(broker).operators

    async def delete_all() -> None:
        async with (
            operators._declared.apart() as call,
            control._dead(call, queue.name, operators._taken, errands.Errand()) as look,
        ):
            async for message in look.each():
                await look.channel._on_cancel_frame(spec.Basic.Cancel("00", nowait=True))
                await look.delete(message)

    with pytest.raises(filao.EngineUnavailable, match=f"{queue.name}.*consumer_timeout"):
        await delete_all()
    assert len(await broker.dead_letters(queue)) == 2


async def test_a_redrive_that_fails_half_way_tells_what_is_done_and_leaves_the_rest_in_order(
    rabbitmq, url, broker, queue
) -> None:
    await broker.send_many(queue, range(120))
    async with filao.connect(url) as consumer, asyncio.timeout(60):  # which is gone before what is redriven comes
        while (await broker.stats(queue)).dead < 120:
            for message in await consumer.receive_many(queue, 120, wait=0.1):
                await message.reject("wrong")
    small = ["small", f"^{re.escape(queue.name)}$", '{"max-length": 3, "overflow": "reject-publish"}']
    await asyncio.to_thread(rabbitmq.command, "set_policy", "--apply-to", "queues", *small)
    last = [letter.id for letter in await broker.dead_letters(queue, limit=120)][-100:]  # more than are sent at once
    try:
        with pytest.raises(filao.EngineUnavailable, match=r"^\d+ messages are done, and will stay so. Of the rest: "):
            await broker.redrive(queue, ids=last)
    finally:
        await asyncio.to_thread(rabbitmq.command, "clear_policy", "small")
    left = [letter.body for letter in await broker.dead_letters(queue, limit=120)]
    assert left == sorted(left)
    assert (await broker.stats(queue)).ready == 120 - len(left)


async def test_a_list_of_dead_letters_holds_none_of_their_bodies(broker, queue) -> None:
    """Ten thousand of them, with theirs, were more than a machine's memory."""
    await broker.send_many(queue, [b"x" * 200_000] * 30)
    for _ in range(30):
        await (await broker.receive_from_queue(queue)).reject("no")
    overview = engine_of(broker).overview
    tracemalloc.start()
    try:
        (*_, last) = await overview.glance(queue.name, filao.State.DEAD, limit=1_000)
        assert (await overview.find(queue.name, last.id)).body == b"x" * 200_000
        assert tracemalloc.get_traced_memory()[1] < 30 * 200_000 / 2
    finally:
        tracemalloc.stop()


async def test_letters_of_strangers_without_an_id_are_not_deleted_for_one_another(broker, queue, foreign) -> None:
    """Asked for the id that they lack, each of them would be the one."""
    for error in ("one", "two\u202e"):
        headers = {"x-filao-reason": f"no reason of ours: {error}", "x-filao-error": error}
        properties = pika.BasicProperties(headers=headers)
        foreign.basic_publish("", topology.dead_name(queue.name), b"1", properties)
    async with asyncio.timeout(60):
        while (await broker.stats(queue)).dead < 2:
            await asyncio.sleep(0.05)
    assert await broker.discard(queue, ids=[""]) == 0
    async with visiting(broker, allow_actions=True) as operator:
        page = await operator.sees(f"/en/dead?queue={queue.name}")
        assert "no id: it goes with all of its queue only" in page
        assert "\u202e" not in page
        await operator.sees(f"/en/message?queue={queue.name}&id=", 404)
        assert {letter.reason for letter in await broker.dead_letters(queue)} == {"rejected"}
        await operator.does(Act("discard", queue.name, reason="rejected", error="one"))
        assert (await broker.stats(queue)).dead == 2
        await operator.does(Act("discard", queue.name))
    assert (await broker.stats(queue)).dead == 0


@pytest.mark.parametrize("twice", [None, "7"])
async def test_a_walk_repeats_no_dead_letter_for_an_id_that_is_not_its_own(broker, queue, foreign, twice) -> None:
    """The next page began behind the first that has such an id, or none, again and again."""
    for number, message_id in enumerate(["a", twice, "b", twice, "c"]):
        properties = pika.BasicProperties(message_id=message_id, headers={"x-filao-reason": "rejected"})
        foreign.basic_publish("", topology.dead_name(queue.name), str(number).encode(), properties)
    async with asyncio.timeout(60):
        while (await broker.stats(queue)).dead < 5:
            await asyncio.sleep(0.05)
    first = await broker.dead_letters(queue, limit=3)
    rest = await broker.dead_letters(queue, limit=3, after=first[-1].id)
    assert [letter.body for letter in [*first, *rest]] == [0, 1, 2, 3, 4]
    with pytest.raises(filao.ConfigurationError, match=r"2 dead letters have .*another limit"):
        await broker.dead_letters(queue, limit=1, after=first[1].id)
    assert await broker.dead_letters(queue) == [*first, *rest]


# --- the dashboard ---------------------------------------------------------------------------------------------------


async def test_its_dead_letters_are_triaged_and_what_cannot_be_shown_is_said(broker, queue, monkeypatch) -> None:
    monkeypatch.setattr(pages, "READ_WITHIN", 60.0)  # it asks the server often, and others may keep that busy
    for error in ("one", "two", "two"):
        await broker.send_to_queue(queue, error)
        await (await received(broker, queue)).reject(error)
    while (await broker.stats(queue)).dead < 3:
        await asyncio.sleep(0.05)
    name = queue.name
    async with visiting(broker, allow_actions=True) as operator:
        assert sorted(rows(await operator.sees(f"/en/dead?queue={name}"))) == [(1, "one"), (2, "two")]
        page = await operator.sees(f"/en/queue?name={name}&group=policy-1")
        assert "RabbitMQ shows dead letters only" in page
        assert "Group" not in page  # nor is there anything to choose by it: the two letters are still shown
        assert page.count("two") >= 2
        for path in (f"queue?name={name}", f"queues?q={name}", "processes"):
            page = await operator.sees(f"/en/{path}")
            assert "RabbitMQ tells how much is ready and dead" in page
            assert not re.search(r"delayed<|acknowledged|Pause…|Oldest|in/s|Nobody", page)
        assert "RabbitMQ has no place for a log" in await operator.sees("/en/log")
        await operator.does(Act("redrive", name, reason="rejected", error="two"))
        (letter,) = await broker.dead_letters(queue)
        assert letter.body == "one"
        assert "one" in await operator.sees(f"/en/message?queue={name}&id={letter.id}")
        await operator.does(Act("discard", name, id=letter.id))
        assert await broker.dead_letters(queue) == []
        assert (await operator.sends(Act("pause", name))).status_code == 303
        assert "RabbitMQ" in await operator.sees(f"/en/queue?name={name}")


@pytest.mark.parametrize("anyio_backend", [UVLOOP], ids=["uvloop"])
async def test_a_connection_that_has_gone_is_passed_over_under_uvloop(rabbitmq, queue) -> None:
    """Its transport has no socket any more, where that of asyncio's own loop has one with the number -1."""
    with closing(Proxy(rabbitmq.port)) as proxy:
        async with filao.connect(rabbitmq.url(proxy.port)) as broker:
            await broker.declare(queue)
            await broker.send_to_queue(queue, 1)
            server = engine_of(broker)._server
            (gone,) = (writer for writer in server._sockets._writers if not writer.is_closing())
            gone.transport.abort()
            await gone.wait_closed()
            assert gone.get_extra_info("socket") is None
            server.drop()
