"""Group commit: who shares a batch with whom, and who learns of a failure."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

import filao
import filao.sync
from filao.batching import BATCH_MAX, Batcher
from filao.engine import Batch, Operation, Receive, Result, Send
from filao.engines.sqlite.engine import SqliteEngine
from filao.errors import EngineError, EngineUnavailable, FilaoError, QueueFull
from filao.queue import Queue
from tests.conftest import untraced
from tests.support.stack import with_frames_left

pytestmark = pytest.mark.anyio
PATIENCE = 20.0  # seconds after which a call that never returns fails its test


class Commits:
    """Does what it is told, when it is told to, and remembers the batches."""

    def __init__(self, failing: str = "", error: Exception | None = None) -> None:
        self.batches: list[list[str]] = []
        self.since: list[float] = []
        self.begun_at: list[float] = []
        self.begun = asyncio.Event()
        self.turn = asyncio.Event()
        self.turn.set()
        self.away: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.abandoned: list[Result] = []
        self.failing = failing
        self.error = error

    async def __call__(self, batch: Batch) -> list[Result]:
        self.since.append(batch.since)
        self.begun_at.append(asyncio.get_running_loop().time())
        await self.turn.wait()
        if self.away is not None:
            raise self.away
        names = [operation.queue for operation in batch.take(lambda _: True) if isinstance(operation, Receive)]
        self.batches.append(names)
        self.begun.set()
        await self.open.wait()
        if self.error is not None and self.failing in names:
            raise self.error
        return [FilaoError(name) if name == "refused" else None for name in names]

    def batcher(self) -> Batcher:
        return Batcher(self, self.abandoned.append)


def ask(queue: str) -> Receive:
    return Receive(queue, 1)


async def test_a_lone_call_does_not_wait_for_company() -> None:
    commits = Commits()
    await commits.batcher().submit(ask("a"))
    assert commits.batches == [["a"]]


async def test_calls_of_the_same_moment_share_a_batch() -> None:
    commits = Commits()
    batcher = commits.batcher()
    await asyncio.gather(batcher.submit(ask("a")), batcher.submit(ask("b")), batcher.submit(ask("c")))
    assert commits.batches == [["a", "b", "c"]]


@untraced
async def test_a_call_that_meets_the_end_of_the_stack_keeps_no_other_waiting() -> None:
    commits = Commits()
    batcher = commits.batcher()
    met = 0
    for left in range(1, 40):
        try:
            asked = with_frames_left(left, lambda: batcher.submit(ask("deep")))
        except RecursionError:
            met += 1
        else:
            assert isinstance(asked, asyncio.Future)
            await asked
        async with asyncio.timeout(PATIENCE):
            await batcher.submit(ask("after"))
    assert 0 < met < 39
    assert sum(batch.count("deep") for batch in commits.batches) == 39 - met


async def test_what_comes_during_a_commit_goes_with_the_next() -> None:
    commits = Commits()
    commits.open.clear()
    batcher = commits.batcher()
    first = batcher.submit(ask("a"))
    await commits.begun.wait()
    rest = [batcher.submit(ask(name)) for name in "bcd"]
    commits.open.set()
    await asyncio.gather(first, *rest)
    assert commits.batches == [["a"], ["b", "c", "d"]]


async def test_a_batch_has_a_bound() -> None:
    commits = Commits()
    batcher = commits.batcher()
    await asyncio.gather(*(batcher.submit(ask("a")) for _ in range(BATCH_MAX + 1)))
    assert [len(batch) for batch in commits.batches] == [BATCH_MAX, 1]


async def test_who_gathered_behind_a_batch_has_waited_since_it_came() -> None:
    commits = Commits()
    commits.open.clear()
    batcher = commits.batcher()
    first = batcher.submit(ask("a"))
    await commits.begun.wait()
    before = asyncio.get_running_loop().time()
    second = batcher.submit(ask("b"))
    after = asyncio.get_running_loop().time()
    await asyncio.sleep(0)
    third = batcher.submit(ask("c"))
    commits.open.set()
    await asyncio.gather(first, second, third)
    assert before <= commits.since[1] <= after


async def test_who_has_waited_elsewhere_before_has_waited_since_then() -> None:
    commits = Commits()
    batcher = commits.batcher()
    asked = asyncio.get_running_loop().time() - 10
    await asyncio.gather(*(batcher.submit(ask("a"), since) for since in (None, asked, asked + 5, None)))
    await batcher.submit(ask("d"))
    assert commits.since[0] == asked
    assert commits.since[1] > asked + 10


Call = Callable[[filao.sync.Broker], object]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda broker: broker.send_to_queue("claims", 1), id="send"),
        pytest.param(lambda broker: broker.send_many("claims", [1]), id="send many"),
        pytest.param(lambda broker: broker.receive_from_queue("claims", wait=0), id="look"),
        pytest.param(lambda broker: broker.receive_from_queue("claims", wait=0.01), id="wait"),
    ],
)
async def test_the_first_call_on_a_queue_has_one_time_for_its_rules_and_itself(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    async with filao.connect(url) as broker:
        await broker.declare(Queue("claims"))
    since, learnt = noted(monkeypatch)
    monkeypatch.setattr(SqliteEngine, "at_once", lambda *_: False)  # else a lone call waits for nobody

    def calls() -> None:
        with filao.sync.connect(url) as broker:
            call(broker)

    await asyncio.to_thread(calls)
    assert since[0] < learnt[0]


def noted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """Return since when batches count, and when rules were told, both to be filled in from now on."""
    since: list[float] = []
    learnt: list[float] = []
    execute, find = SqliteEngine.execute, SqliteEngine.find

    async def noting(engine: SqliteEngine, batch: Batch) -> Sequence[Result | asyncio.Future[Result]]:
        since.append(batch.since)
        return await execute(engine, batch)

    async def asking(engine: SqliteEngine, queue: str) -> Queue:
        known = await find(engine, queue)
        learnt.append(time.monotonic())
        return known

    monkeypatch.setattr(SqliteEngine, "execute", noting)
    monkeypatch.setattr(SqliteEngine, "find", asking)
    return since, learnt


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda broker: broker.send_to_queue("claims", "x" * 100), id="send"),
        pytest.param(lambda broker: broker.send_many("claims", ["x" * 100]), id="send many"),
    ],
)
async def test_a_send_that_asks_again_because_its_body_is_too_large_has_one_time_too(
    call: Callable[[filao.Broker], Awaitable[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    since, learnt = noted(monkeypatch)
    async with filao.connect(url) as broker, filao.connect(url) as other:
        await broker.declare(Queue("claims", body_max=10))
        await other.declare(Queue("claims", body_max=1_000))
        await call(broker)
    assert since[0] < learnt[0]


async def test_what_a_full_batch_left_in_line_waits_on_while_batches_are_done() -> None:
    commits = Commits()
    batcher = commits.batcher()
    await asyncio.gather(*(batcher.submit(ask("a")) for _ in range(2 * BATCH_MAX + 1)))
    assert commits.since[2] > commits.begun_at[0]


async def test_a_failure_reaches_its_own_caller_alone() -> None:
    commits = Commits(failing="bad", error=EngineError("too big"))
    batcher = commits.batcher()
    calls = [batcher.submit(ask(name)) for name in ("a", "bad", "b")]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(result) for result in results] == ["None", "too big", "None"]
    assert commits.batches == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]
    assert commits.since[1] > commits.begun_at[0]  # the time limit of each begins anew


async def test_nothing_is_repeated_when_the_storage_is_away() -> None:
    commits = Commits(failing="a", error=EngineUnavailable("away"))
    batcher = commits.batcher()
    results = await asyncio.gather(batcher.submit(ask("a")), batcher.submit(ask("b")), return_exceptions=True)
    assert [str(result) for result in results] == ["away", "away"]
    assert len(commits.batches) == 1


async def test_a_refusal_is_raised_to_its_caller() -> None:
    batcher = Commits().batcher()
    with pytest.raises(FilaoError, match="refused"):
        await batcher.submit(ask("refused"))


async def test_a_call_cancelled_before_its_batch_began_is_not_done() -> None:
    commits = Commits()
    batcher = commits.batcher()
    first, second = batcher.submit(ask("a")), batcher.submit(ask("b"))
    first.cancel()
    await second
    assert commits.batches == [["b"]]


async def test_the_result_of_a_call_cancelled_meanwhile_is_handed_back() -> None:
    commits = Commits()
    commits.open.clear()
    batcher = commits.batcher()
    call = batcher.submit(ask("a"))
    await commits.begun.wait()
    call.cancel()
    commits.open.set()
    await batcher.drain()
    assert commits.abandoned == [None]


async def test_a_call_that_the_closing_of_its_broker_ended_says_that_it_is_open_what_was_done() -> None:
    commits = Commits()
    commits.open.clear()
    batcher = commits.batcher()
    call = batcher.submit(ask("a"))
    await commits.begun.wait()
    for doing in batcher._doing:
        doing.cancel()
    with pytest.raises(EngineUnavailable, match=r"closed before the engine had answered.*open whether the message was"):
        await call


async def test_the_batcher_goes_on_after_a_failure() -> None:
    commits = Commits(failing="bad", error=QueueFull("no"))
    batcher = commits.batcher()
    with pytest.raises(QueueFull):
        await batcher.submit(ask("bad"))
    assert await batcher.submit(ask("good")) is None


async def test_what_comes_while_the_engine_waits_for_its_turn_comes_along() -> None:
    commits = Commits()
    commits.turn.clear()
    batcher = commits.batcher()
    first = batcher.submit(ask("a"))
    await asyncio.sleep(0)
    rest = [batcher.submit(ask(name)) for name in "bcd"]
    commits.turn.set()
    await asyncio.gather(first, *rest)
    assert commits.batches == [["a", "b", "c", "d"]]


async def test_a_batch_ends_before_what_the_engine_does_not_accept() -> None:
    batches: list[str] = []
    accepted = iter(("ac", "abc"))

    async def execute(batch: Batch) -> list[Result]:
        some = next(accepted)
        taken = batch.take(lambda operation: isinstance(operation, Receive) and operation.queue in some)
        batches.append("".join(operation.queue for operation in taken if isinstance(operation, Receive)))
        return [None] * len(taken)

    batcher = Batcher(execute, lambda _: None)
    await asyncio.gather(*(batcher.submit(ask(name)) for name in "abc"))
    assert batches == ["a", "bc"]


async def test_an_engine_that_cannot_begin_fails_those_who_waited_for_it() -> None:
    commits = Commits()
    commits.turn.clear()
    commits.away = EngineUnavailable("away")
    batcher = commits.batcher()
    calls = [batcher.submit(ask("a")), batcher.submit(ask("b"))]
    await asyncio.sleep(0)
    commits.turn.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(result) for result in results] == ["away", "away"]
    commits.away = None
    assert await batcher.submit(ask("c")) is None
    assert commits.batches == [["c"]]


@pytest.mark.parametrize(("error", "told"), [(None, EngineUnavailable), (ZeroDivisionError(), ZeroDivisionError)])
async def test_a_late_result_that_never_comes_is_told_to_its_caller(error, told) -> None:
    late: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    async def execute(batch: Batch) -> list[asyncio.Future[Result]]:
        return [late for _ in batch.take(lambda _: True)]

    batcher = Batcher(execute, lambda _: None)
    asked = batcher.submit(ask("a"))
    drains = [asyncio.ensure_future(batcher.drain())]
    while not batcher._late:
        await asyncio.sleep(0)
    drains.append(asyncio.ensure_future(batcher.drain()))
    await asyncio.sleep(0)
    assert not any(drained.done() for drained in drains)
    if error is None:
        late.cancel()
    else:
        late.set_exception(error)
    with pytest.raises(told):
        async with asyncio.timeout(PATIENCE):
            await asked
    await asyncio.gather(*drains)


async def test_who_drains_waits_for_every_batch_under_way() -> None:
    under_way: list[str] = []
    ends = {name: asyncio.Event() for name in "ab"}

    async def execute(batch: Batch) -> list[Result]:
        (operation,) = batch.take(lambda _: True)
        assert isinstance(operation, Receive)
        under_way.append(operation.queue)
        await ends[operation.queue].wait()
        return [None]

    batcher = Batcher(execute, lambda _: None, concurrent_batches=2)
    calls: list[asyncio.Future[Result]] = []
    for name in "ab":
        calls.append(batcher.submit(ask(name)))
        while name not in under_way:
            await asyncio.sleep(0)
    gone, drained = (asyncio.ensure_future(batcher.drain()) for _ in range(2))
    ends["a"].set()
    await calls[0]
    await asyncio.sleep(0)
    assert not drained.done()
    gone.cancel()
    ends["b"].set()
    async with asyncio.timeout(PATIENCE):
        await drained
    assert calls[1].done()


async def test_who_drains_waits_for_what_was_submitted_just_before() -> None:
    batcher = Commits().batcher()
    asked = batcher.submit(ask("a"))
    await batcher.drain()
    assert asked.done()


async def test_a_batch_may_be_taken_in_another_thread_before_the_loop_has_gone_on() -> None:
    sizes: list[int] = []

    async def done(results: list[Result]) -> list[Result]:
        return results

    def execute(batch: Batch) -> Awaitable[list[Result]]:
        taken: list[Operation] = []
        thread = threading.Thread(target=lambda: taken.extend(batch.take(lambda _: True)))
        thread.start()
        thread.join()
        sizes.append(len(taken))
        return done([None] * len(taken))

    batcher = Batcher(execute, lambda _: None)
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(batcher.submit(ask("a")) for _ in range(BATCH_MAX + 1)))
    assert sizes == [BATCH_MAX, 1]


async def test_an_engine_is_told_whether_a_batch_receives_and_whether_it_writes() -> None:
    told: list[tuple[bool, bool]] = []

    async def execute(batch: Batch) -> list[Result]:
        told.append((batch.receives, batch.writes))
        return [None for _ in batch.take(lambda _: True)]

    batcher = Batcher(execute, lambda _: None)
    batches: list[list[Operation]] = [[ask("a")], [Send("a", [])], [ask("a"), Send("a", [])]]
    for operations in batches:
        await asyncio.gather(*map(batcher.submit, operations))
    assert told == [(True, False), (False, True), (True, True)]


async def test_what_a_full_batch_leaves_goes_at_once_with_another_if_the_engine_does_two() -> None:
    sizes: list[int] = []
    both = asyncio.Event()

    async def execute(batch: Batch) -> list[Result]:
        taken = batch.take(lambda _: True)
        sizes.append(len(taken))
        if len(sizes) == 2:
            both.set()
        await both.wait()
        return [None] * len(taken)

    batcher = Batcher(execute, lambda _: None, concurrent_batches=2)
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(batcher.submit(ask("a")) for _ in range(BATCH_MAX + 1)))
    assert sizes == [BATCH_MAX, 1]


async def test_an_engine_with_one_lane_is_never_given_two_batches_at_once() -> None:
    at_once: list[int] = []
    running = 0

    async def execute(batch: Batch) -> list[Result]:
        nonlocal running
        running += 1
        at_once.append(running)
        taken = batch.take(lambda _: True)
        await asyncio.sleep(0)
        running -= 1
        return [None] * len(taken)

    def return_it(_: Result) -> None:
        """Do as a broker does with what a cancelled caller received: something else is submitted while a batch ends."""
        later.append(batcher.submit(ask("given back")))

    later: list[asyncio.Future[Result]] = []
    batcher = Batcher(execute, return_it)
    first, second = batcher.submit(ask("a")), batcher.submit(ask("b"))
    await asyncio.sleep(0)
    others = [batcher.submit(ask("c")) for _ in range(BATCH_MAX)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(second, *others)
    await asyncio.gather(*later)
    assert later
    assert max(at_once) == 1
