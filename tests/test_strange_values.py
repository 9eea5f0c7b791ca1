"""What is no value of the kind that a call asks for is refused in words, by every call, whatever it is."""

import inspect
from collections import UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest

import filao
import filao.sync
from filao.errors import FilaoError


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("cannot be printed")


STRANGE = {
    "an object": object(),
    "a number of 5,000 digits": 10**5000,
    "a list of a list": [[]],
    "bytes": b"x",
    "half a surrogate pair": "\ud800",
    "what cannot be printed": Unprintable(),
}
SEVEN: Any = 7
CALLS: dict[str, Callable[[filao.sync.Broker, Any], object]] = {
    "a queue's name": lambda broker, it: broker.send_to_queue(it, 1),
    "a queue's name in a look": lambda broker, it: broker.stats(it),
    "a queue's type": lambda broker, it: broker.declare(filao.Queue("typed", body=it)),
    "headers": lambda broker, it: broker.send_to_queue("claims", 1, headers=it),
    "a delay": lambda broker, it: broker.send_to_queue("claims", 1, delay=it),
    "a time to live": lambda broker, it: broker.send_to_queue("claims", 1, ttl=it),
    "a priority": lambda broker, it: broker.send_to_queue("claims", 1, priority=it),
    "a group": lambda broker, it: broker.send_to_queue("claims", 1, group=[it]),  # type: ignore[arg-type]
    "a connection": lambda broker, it: broker.send_to_queue("claims", 1, within=it),
    "a wait": lambda broker, it: broker.receive_from_queue("claims", wait=it),
    "a limit": lambda broker, it: broker.receive_many("claims", it, wait=0),
    "a guarantee": lambda broker, it: broker.receive_from_queue("claims", wait=0, guarantee=it),
    "a state": lambda broker, it: broker.peek("claims", state=it),
    "the last message seen": lambda broker, it: broker.peek("claims", after=it),
    "ids to redrive": lambda broker, it: broker.redrive("claims", ids=it if it != b"x" else SEVEN),
    "ids to discard": lambda broker, it: broker.discard("claims", ids=[it, SEVEN]),
    "an id to cancel": lambda broker, it: broker.cancel("claims", [it]),  # type: ignore[arg-type]
    "an id to trace": lambda broker, it: broker.trace([it]),  # type: ignore[arg-type]
    "a group to pause": lambda broker, it: broker.pause("claims", group=it if it != b"x" else SEVEN),
    "a statement": lambda broker, it: in_transaction(broker, lambda tx: tx.execute(it)),
    "a message": lambda broker, it: in_transaction(broker, lambda tx: tx.ack(it)),
    "a URL": lambda _, it: filao.connect(it if it != "\ud800" else SEVEN),
    "a durability": lambda _, it: filao.connect("x.db", durability=it),
    "a factor": lambda _, it: filao.Backoff(factor=it),
    "a jitter": lambda _, it: filao.Backoff(jitter=it),
    "an overflow": lambda _, it: filao.Queue("claims", overflow=it),
    "a backoff": lambda _, it: filao.Queue("claims", backoff=it),
    "a weight": lambda _, it: filao.Worker("x.db").consumer("claims", weight=it),
    "outcomes": lambda _, it: filao.Worker("x.db").consumer("claims", outcomes=it),
    "a handler": lambda _, it: filao.Worker("x.db").consumer("claims")(it),
    "a pause": lambda _, it: filao.Retry(delay=it),
}


def in_transaction(broker: filao.sync.Broker, use: Callable[[filao.sync.Transaction], object]) -> None:
    with broker.transaction() as tx:
        use(tx)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory):
    with filao.sync.connect(tmp_path_factory.mktemp("strange") / "claims.db") as opened:
        opened.declare(filao.Queue("claims", group_dead="halt"))
        yield opened


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_of_another_kind_is_refused_in_words(broker, call: str, strange: str) -> None:
    with pytest.raises(FilaoError):
        CALLS[call](broker, STRANGE[strange])


@pytest.mark.parametrize("bodies", ["text", b"bytes", {"claim_id": 7}, 7, None])
def test_what_is_no_list_of_bodies_is_refused_and_nothing_is_sent(broker, bodies: Any) -> None:
    before = broker.stats("claims").sent
    with pytest.raises(filao.ConfigurationError, match="give a list"):
        broker.send_many("claims", bodies)
    with pytest.raises(filao.ConfigurationError, match="give a list"):
        in_transaction(broker, lambda tx: tx.send_many("claims", bodies))
    assert broker.stats("claims").sent == before


@pytest.mark.parametrize("headers", [MappingProxyType({"tenant": "a"}), UserDict({"tenant": "a"})], ids=repr)
def test_headers_may_be_any_mapping(broker, headers: Any) -> None:
    broker.send_to_queue("claims", 1, headers=headers, priority=9)
    message = broker.receive_from_queue("claims")
    message.ack()
    assert message.headers == {"tenant": "a"}


def test_a_message_tells_which_keys_its_body_has_and_is_no_list(broker) -> None:
    broker.send_to_queue("claims", {"claim_id": 7}, priority=9)
    message = broker.receive_from_queue("claims")
    message.ack()
    assert "claim_id" in message
    assert "amount" not in message
    with pytest.raises(TypeError, match="not iterable"):
        list(message)


def test_a_list_of_queues_is_told_how_it_is_declared(broker) -> None:
    with pytest.raises(filao.ConfigurationError, match=r"or several, as in declare\(\*queues\)"):
        broker.declare([filao.Queue("claims")])


def test_a_weight_without_bound_is_refused() -> None:
    for weight in (float("inf"), float("nan"), 0.0, -1.0):
        with pytest.raises(filao.ConfigurationError, match="weight"):
            filao.Worker("x.db").consumer("claims", weight=weight)


def test_every_way_to_send_is_tried() -> None:
    """A parameter that is added is added here."""
    known = {"queue", "body", "headers", "delay", "ttl", "priority", "group", "within", "dedup_key", "message_id"}
    assert set(inspect.signature(filao.Broker.send_to_queue).parameters) == known | {"self"}


@pytest.mark.parametrize("url", ["postgresql+psycopg://ana:secret@host/db", "sqlite+aiosqlite:///claims.db"])
def test_a_url_that_names_a_driver_is_told_how_it_begins(url) -> None:
    with pytest.raises(filao.ConfigurationError, match=r"names a driver.*begin with (postgresql|sqlite)://") as raised:
        filao.connect(url)
    assert "secret" not in str(raised.value)
