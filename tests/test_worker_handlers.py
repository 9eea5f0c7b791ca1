"""What a handler may be, where it runs, and what a wrong one is told."""

import functools
import sys
import threading
from typing import Any

import pytest

import filao
import filao.sync
from filao.worker.handlers import check_body, handler_of
from tests.support.working import CLAIMS, PATIENCE, Claim, broker, plain, refused

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


async def test_a_plain_function_runs_in_a_thread_with_the_blocking_message(url, broker) -> None:
    worker, seen = filao.Worker(url), []

    @worker.consumer(CLAIMS)
    def handle(message: filao.sync.Message[Claim]) -> None:
        message.extend(60)
        seen.append((message.body, threading.current_thread() is threading.main_thread()))

    await broker.send_to_queue("claims", {"number": 7})
    assert [handled.how for handled in await worker.drain()] == ["acked"]
    assert seen == [(Claim(7), False)]


async def test_a_plain_wrapper_of_a_coroutine_function_fails_instead_of_doing_nothing(url, broker) -> None:
    worker, ran = filao.Worker(url), []

    async def real(message: filao.Message) -> None:
        ran.append(message.body)

    worker.consumer(CLAIMS)(lambda message: real(message))  # noqa: PLW0108  # the mistake
    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert (handled.how, ran) == ("retried", [])
    assert "returned a coroutine that nobody runs" in handled.error


async def test_partial_functions_and_objects_that_can_be_called_are_handlers(url, broker) -> None:
    worker, seen = filao.Worker(url), []

    async def handle(kept: list[Any], message: filao.Message[Claim]) -> None:
        kept.append(message.body)

    class Handler:
        async def __call__(self, message: filao.Message[Claim]) -> None:
            seen.append(message.body)

    worker.consumer(CLAIMS)(functools.partial(handle, seen))
    worker.consumer(filao.Queue("letters"))(Handler())
    for queue in ("claims", "letters"):
        await broker.declare(filao.Queue(queue))
        await broker.send_to_queue(queue, {"number": 7})
    await worker.drain()
    assert seen == [Claim(7), Claim(7)]


async def test_plain_functions_run_at_the_same_time(url, broker) -> None:
    worker, meeting = filao.Worker(url), threading.Barrier(3, timeout=PATIENCE)

    @worker.consumer(CLAIMS, concurrency=3)
    def handle(message: filao.sync.Message) -> None:
        meeting.wait()

    await broker.send_many("claims", range(6))
    assert [handled.how for handled in await worker.drain()] == ["acked"] * 6


async def test_a_plain_function_that_raises_stop_iteration_fails(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    def handle(message: filao.sync.Message) -> None:
        raise StopIteration

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["retried"]


async def of_two(message: filao.Message, other) -> None: ...  # nothing says what a lifespan should give


async def of_none() -> None: ...


async def of_an_int(message: int) -> None: ...


async def of_sync(message: filao.sync.Message) -> None: ...


def of_async(message: filao.Message) -> None: ...


async def generator(message: filao.Message) -> Any:
    yield message


async def of_claims(message: filao.Message[Claim]) -> None: ...


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (of_two, "the handler of_two cannot be called as async def of_two(message)"),
        (of_none, "the handler of_none cannot be called as async def of_none(message)"),
        (of_an_int, "asks for <class 'int'>; it gets a message with a body: annotate it message: filao.Message[int]"),
        (of_sync, "is a coroutine function, which gets a filao.Message"),
        (of_async, "is a plain function, which gets a filao.sync.Message"),
        (generator, "is a generator"),
        (7, "a handler must be a function, not 7"),
    ],
)
def test_a_wrong_handler_is_refused_when_it_is_registered(function, text) -> None:
    assert text in refused(lambda worker: worker.consumer("claims")(function))


def test_a_consumer_without_its_queue_is_told_what_to_write() -> None:
    assert "write @worker.consumer(queue)" in refused(lambda worker: worker.consumer(of_two))  # type: ignore[arg-type]


def test_annotations_that_only_a_type_checker_can_read_refuse_no_handler_but_for_the_messages() -> None:
    async def handle(it: filao.Message[Claim], other: "No" = 1) -> "No": ...  # type: ignore[name-defined]  # noqa: F821

    async def wrong(message: "filao.Message[Unknown]") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    filao.Worker("claims.db").consumer("claims")(handle)
    with pytest.raises(filao.ConfigurationError, match=r"annotation that cannot be read, message: filao.Message\[Unk"):
        filao.Worker("claims.db").consumer("claims")(wrong)


def test_the_type_of_what_a_lifespan_gives_that_cannot_be_read_is_told() -> None:
    async def wrong(message: filao.Message, pool: "list[Pool]") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    late: dict[str, Any] = {"filao": filao}
    if sys.version_info >= (3, 14):  # where it need be no text
        exec("async def wrong(message: filao.Message, pool: list[Pool]) -> None: ...", late)
    for function in (wrong, late.get("wrong", wrong)):
        with pytest.raises(filao.ConfigurationError, match="only under `if TYPE_CHECKING:`") as raised:
            filao.Worker("claims.db").consumer("claims")(function)
        assert "annotation that cannot be read, pool: list[Pool]: name 'Pool' is not defined" in str(raised.value)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has no `type` statement")
def test_a_type_statement_names_the_messages_their_bodies_and_what_a_lifespan_gives() -> None:
    names: dict[str, Any] = {"filao": filao, "Claim": Claim}
    exec(  # older versions cannot read it
        "type Body = Claim\ntype Claims = filao.Message[Body]\ntype Of[T] = filao.Message[T]\ntype Pool = list[int]\n"
        "async def named(message: Claims, pool: Pool) -> None: ...\nasync def given(message: Of[Claim]) -> None: ...\n",
        names,
    )
    for name, wants in (("named", {"pool": list}), ("given", {})):
        handler = handler_of(names[name], with_transaction=False)
        assert (handler.body, handler.wants) == (Claim, wants)
        filao.Worker("claims.db").consumer(filao.Queue("claims", body=names["Body"]))(names[name])


def test_a_handler_of_another_type_than_its_queue_is_refused() -> None:
    assert "queue 'claims' has <class 'int'>" in refused(
        lambda worker: worker.consumer(filao.Queue("claims", body=int))(of_claims)  # type: ignore[arg-type]
    )


def test_an_exactly_once_handler_must_take_the_transaction() -> None:
    text = refused(lambda worker: worker.consumer("claims", guarantee="exactly-once")(plain))
    assert "async def plain(message, transaction)" in text


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has no `type` statement")
def test_the_parameters_of_a_type_statement_are_those_that_it_declares() -> None:
    names: dict[str, Any] = {"filao": filao}
    exec(
        "type Pair[A, B] = dict[B, A]\ntype Same[T] = T\ntype Unused[T] = int\ntype Late = Missing\n"
        "async def pair(message: filao.Message[Pair[int, str]]) -> None: ...\n"
        "async def same(message: Same[filao.Message[Unused[str]]]) -> None: ...\n"
        "async def late(message: filao.Message[Late]) -> None: ...\n"
        "async def plain(message: filao.Message[int]) -> None: ...\n",
        names,
    )
    assert handler_of(names["pair"], with_transaction=False).body == dict[str, int]
    assert handler_of(names["same"], with_transaction=False).body is int
    with pytest.raises(filao.ConfigurationError, match=r"cannot be read, message: .*'Missing' is not defined"):
        handler_of(names["late"], with_transaction=False)
    with pytest.raises(filao.ConfigurationError, match=r"'claims' has a type .* cannot be read, Late: .*'Missing'"):
        check_body(handler_of(names["plain"], with_transaction=False), filao.Queue("claims", body=names["Late"]))
