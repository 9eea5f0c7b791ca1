"""What becomes of a message: what its handler returns or raises, on each engine."""

import asyncio

import pytest

import filao
from tests.support.working import AGAIN, CLAIMS, Claim, broker, running, until_stats

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


async def test_returning_acknowledges(url, broker) -> None:
    worker, seen = filao.Worker(url), []

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message[Claim]) -> None:
        seen.append(message.body)

    await broker.send_to_queue("claims", {"number": 7})
    (handled,) = await worker.drain()
    assert seen == [Claim(7)]
    assert (handled.queue, handled.how, handled.attempt, handled.error) == ("claims", "acked", 1, "")
    assert (await broker.stats("claims")).acked == 1


async def test_raising_tries_again_and_then_it_is_a_dead_letter_with_the_traceback(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(AGAIN)
    async def handle(message: filao.Message) -> None:
        raise ValueError("no such policy")

    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until_stats(broker, dead=1)
    (dead,) = await broker.dead_letters("claims")
    assert (dead.reason, dead.attempts) == ("max_attempts", 3)
    assert "ValueError: no such policy" in dead.error
    assert "in handle" in dead.error


STEERS = [
    (filao.Retry("later", delay=60), "retried", "delayed"),
    (filao.Retry, "retried", "delayed"),
    (filao.Reject("never"), "dead", "dead"),
    (filao.Reject, "dead", "dead"),
]


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "returned"])
@pytest.mark.parametrize(("steer", "how", "state"), STEERS)
async def test_a_handler_steers(url, broker, steer, how, state, raised) -> None:  # noqa: PLR0917  # pytest names them
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> object:
        if raised:
            raise steer
        return steer

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert handled.how == how
    assert getattr(await broker.stats("claims"), state) == 1


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "returned"])
async def test_release_gives_it_back_without_using_an_attempt(url, broker, raised) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> object:
        if raised:
            raise filao.Release
        return filao.Release()

    await broker.send_to_queue("claims", 1)
    handled = await worker.drain(limit=9)
    assert [one.how for one in handled] == ["released"] * 9
    assert [one.attempt for one in handled] == [1] * 9


async def test_a_message_is_put_off_with_no_attempt_used(url, broker, caplog) -> None:
    caplog.set_level("INFO", "filao.worker")
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> filao.Release | None:
        return None if message.body == "done" else filao.Release(delay=3600)

    await broker.send_many("claims", ["later", "done"])
    assert [one.how for one in await worker.drain()] == ["released", "acked"]
    (waiting,) = await broker.peek("claims", state="delayed")
    assert (waiting.body, waiting.attempts, waiting.history) == ("later", 0, ())
    assert "again in 3600 s, the attempt not counted" in caplog.text
    with pytest.raises(filao.ConfigurationError, match="delay is -1"):
        filao.Release(delay=-1)
    with pytest.raises(filao.ConfigurationError, match=r"given 30; a delay has its name: Release\(delay="):
        filao.Release(30)


async def test_exceptions_are_mapped_to_outcomes_the_most_specific_first(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(
        CLAIMS, outcomes={LookupError: filao.Reject, OSError: filao.Retry(delay=60), KeyError: filao.Retry(delay=50)}
    )
    async def handle(message: filao.Message) -> None:
        raise {"key": KeyError("a"), "index": IndexError("b"), "os": ConnectionError("c")}[message.body]

    await broker.send_many("claims", ["key", "index", "os"])
    assert [handled.how for handled in await worker.drain()] == ["retried", "dead", "retried"]
    (dead,) = await broker.dead_letters("claims")
    assert "IndexError: b" in dead.error


def together(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("in a TaskGroup", errors)


TOGETHER = [
    (together(filao.Reject("never"), filao.Reject("no")), "dead", "never"),
    (together(filao.Release(delay=60), together(filao.Retry("later", delay=60))), "retried", "later"),
    (together(filao.Release(delay=60)), "released", ""),
    (together(filao.Retry("later"), KeyError("policy"), filao.Release()), "dead", "KeyError: 'policy'"),
    (together(filao.Reject("never"), ValueError("fails")), "retried", "ValueError: fails"),
]


@pytest.mark.parametrize(("raised", "how", "why"), TOGETHER)
async def test_a_group_of_decisions_is_the_most_final_of_them(url, broker, raised, how, why) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS, outcomes={KeyError: filao.Reject})
    async def handle(message: filao.Message) -> None:
        raise raised

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert (handled.how, handled.error.strip().rpartition("\n")[2]) == (how, why)


@pytest.mark.parametrize("steer", [filao.Reject, filao.Retry(delay=60)], ids=["reject", "retry"])
async def test_a_decision_without_a_reason_keeps_the_error_for_which_it_was_raised(url, broker, steer) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        try:
            raise KeyError("policy-12")
        except KeyError:
            raise steer  # noqa: B904  # as many write it

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert handled.error.endswith("KeyError: 'policy-12'\n")


async def test_a_retry_with_a_negative_delay_is_the_handlers_error(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> object:
        return filao.Retry(delay=-1)

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert (handled.how, "delay is -1" in handled.error) == ("retried", True)


async def test_a_handler_may_settle_by_itself(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        await message.reject("by hand")

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["settled"]
    assert (await broker.stats("claims")).dead == 1


async def test_a_body_that_does_not_fit_the_handlers_type_is_a_dead_letter(url, broker) -> None:
    worker, seen = filao.Worker(url), []

    @worker.consumer("claims")
    async def handle(message: filao.Message[Claim]) -> None:
        seen.append(message.body.number)

    await broker.send_to_queue("claims", {"number": "seven"})
    await broker.send_to_queue("claims", {"number": 8})
    await worker.drain()
    (dead,) = await broker.dead_letters("claims")
    assert (seen, dead.reason, dead.attempts) == ([8], "malformed", 1)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), GeneratorExit()], ids=repr)
async def test_a_handler_that_would_end_the_process_fails_like_any_other(url, broker, error) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS, concurrency=2)
    async def handle(message: filao.Message) -> None:
        if message.body == 1:
            raise error

    await broker.send_many("claims", [1, 2])
    assert sorted(handled.how for handled in await worker.drain()) == ["acked", "retried"]
