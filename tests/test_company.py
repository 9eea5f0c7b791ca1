"""Threads whose calls come together share a commit, and none is harmed when another is interrupted."""

import ctypes
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sized
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

import filao
import filao.sync
from filao import company
from filao.broker import session_of
from filao.company import Company
from filao.engine import Operation
from filao.engines.sqlite.engine import SqliteEngine
from filao.errors import EngineError, EngineUnavailable, LeaseLost, QueueNotFound
from filao.sync import door_of
from tests.conftest import untraced
from tests.support.instructions import instructions, interrupted
from tests.support.stack import with_frames_left

PATIENCE = 20.0  # seconds after which a call that never returns fails its test


@pytest.fixture
def broker(tmp_path: Path) -> Generator[filao.sync.Broker]:
    with filao.sync.connect(tmp_path / "company.db", durability="relaxed") as broker:
        broker.declare(filao.Queue("q", lease=1.0))
        broker.send_to_queue("q", "known")
        broker.receive_from_queue("q").ack()
        yield broker


def company_of(broker: filao.sync.Broker) -> Company:
    ours = cast("Any", session_of(broker._here).at_once).__self__
    assert isinstance(ours, Company)
    return ours


class Thread(threading.Thread):
    """Makes a call, and keeps what comes of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.result: object = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error

    def ended(self) -> "Thread":
        self.join(PATIENCE)
        assert not self.is_alive()
        return self


class Interrupt(BaseException):
    """Interrupts a thread, as a worker interrupts that of a handler whose time is up."""


def interrupt(thread: threading.Thread) -> None:
    number = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(Interrupt))


def until(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.0001)


@contextmanager
def led(broker: filao.sync.Broker) -> Generator[Company]:
    """Lead in this thread, so that others gather; afterwards one of those leads."""
    ours = company_of(broker)
    assert ours._leading.acquire(timeout=PATIENCE)
    yield ours
    ours._resign()


def gather(broker: filao.sync.Broker, *calls: Callable[[], object]) -> list[Thread]:
    """Make calls, in this order, that wait in line; the caller leads."""
    ours = company_of(broker)
    threads = []
    for call in calls:
        before = len(ours._gathered)
        threads.append(Thread(call))
        until(partial(_is_longer, ours._gathered, before))
    return threads


def _is_longer(gathered: Sized, before: int) -> bool:
    return len(gathered) > before


def engine_of(broker: filao.sync.Broker) -> SqliteEngine:
    engine = session_of(door_of(broker)).engine
    assert isinstance(engine, SqliteEngine)
    return engine


@contextmanager
def statements(broker: filao.sync.Broker) -> Generator[list[str]]:
    """Collect the statements that are made in the block."""
    db = engine_of(broker)._hold.db
    assert db is not None
    made: list[str] = []
    db.set_trace_callback(made.append)
    try:
        yield made
    finally:
        db.set_trace_callback(None)


def submissions(broker: filao.sync.Broker) -> list[Operation]:
    """Return a list to which every operation is added that goes to the loop from now on."""
    session = session_of(door_of(broker))
    submitted: list[Operation] = []
    submit = session.submit

    def noted(operation: Operation, since: float | None = None) -> Any:
        submitted.append(operation)
        return submit(operation, since)

    session.submit = noted
    return submitted


def sender(broker: filao.sync.Broker, body: object = 1, queue: str = "q") -> Callable[[], object]:
    return lambda: broker.send_to_queue(queue, body)


def test_threads_that_come_together_share_a_commit_in_the_order_of_their_coming(broker) -> None:
    with statements(broker) as made:
        with led(broker):
            threads = gather(broker, *(sender(broker, number) for number in range(8)))
        assert all(thread.ended().error is None for thread in threads)
    assert made.count("COMMIT") == 1
    assert len({str(thread.result) for thread in threads}) == len(threads)
    assert [message.body for message in broker.receive_many("q", 10)] == list(range(8))


def test_a_thread_whose_call_does_not_fit_into_the_batch_that_it_leads_has_it_done_once(broker, monkeypatch) -> None:
    monkeypatch.setattr(company, "BATCH_MAX", 1)
    ours = company_of(broker)
    assert ours._leading.acquire(timeout=PATIENCE)
    threads = gather(broker, sender(broker, "first"), sender(broker, "leader's"))
    leader = ours._gathered[-1]
    ours._leading.release()
    leader.wake()
    assert all(thread.ended().error is None for thread in threads)
    assert Thread(sender(broker, "later")).ended().error is None
    assert [message.body for message in broker.receive_many("q", 10)] == ["first", "leader's", "later"]


def test_each_thread_gets_what_it_asked_for(broker) -> None:
    broker.send_many("q", ["first", "second", "third"])
    first, second = broker.receive_many("q", 2)
    with statements(broker) as made:
        with led(broker):
            sent, acked, extended, received = gather(
                broker,
                sender(broker, "fourth"),
                first.ack,
                lambda: second.extend(5.0),
                lambda: broker.receive_from_queue("q").body,
            )
        assert [thread.ended().error for thread in (sent, acked, extended, received)] == [None] * 4
    assert made.count("COMMIT") == 1
    assert received.result == "third"
    assert isinstance(sent.result, filao.Receipt)
    second.ack()
    stats = broker.stats("q")
    assert (stats.ready, stats.leased, stats.acked) == (1, 1, 3)


def test_a_refusal_is_told_to_the_thread_whose_call_is_refused(broker) -> None:
    broker.declare(filao.Queue("gone"))
    broker.send_to_queue("gone", "known")
    with filao.sync.connect(engine_of(broker)._hold.path) as other:
        other.delete_queue("gone", messages=True)
    with led(broker):
        well, ill, also = gather(broker, sender(broker), sender(broker, queue="gone"), sender(broker))
    assert isinstance(ill.ended().error, QueueNotFound)
    assert well.ended().error is also.ended().error is None
    assert broker.stats("q").ready == 2


def test_a_full_file_is_told_to_the_threads_whose_calls_do_not_fit(broker) -> None:
    broker.send_to_queue("q", "held")
    held = broker.receive_from_queue("q")
    db = engine_of(broker)._hold.db
    assert db is not None
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    with led(broker):
        *large, ack = gather(broker, *(sender(broker, b"x" * 100_000) for _ in range(3)), held.ack)
    assert {type(thread.ended().error) for thread in large} == {EngineError}
    assert ack.ended().error is None
    stats = broker.stats("q")
    assert (stats.ready, stats.leased, stats.acked) == (0, 0, 2)


def test_what_the_leader_cannot_do_without_waiting_goes_to_the_loop(broker) -> None:
    """Another program writes, so all of them wait for it there, within the limit of a call."""
    with filao.sync.connect(engine_of(broker)._hold.path) as other, other.transaction() as transaction:
        transaction.send_to_queue("q", "first")
        with led(broker):
            threads = gather(broker, *(sender(broker) for _ in range(4)))
        until(lambda: not company_of(broker)._gathered)
        assert all(thread.is_alive() for thread in threads)
    assert all(thread.ended().error is None for thread in threads)
    assert broker.stats("q").ready == 5


@pytest.mark.parametrize(("whose", "last_on_the_loop"), [("another process's", 5), ("its own", 4)])
def test_threads_go_on_together_on_the_loop_only_while_other_processes_take_turns(
    broker, whose, last_on_the_loop
) -> None:
    submitted = submissions(broker)
    with filao.sync.connect(engine_of(broker)._hold.path) as other:
        with (broker if whose == "its own" else other).transaction() as transaction:
            transaction.send_to_queue("q", "while all others wait")
            with led(broker):
                threads = gather(broker, *(sender(broker) for _ in range(4)))
            until(lambda: len(submitted) == 4)
        assert all(thread.ended().error is None for thread in threads)
        for _ in range(3):
            assert Thread(sender(broker)).ended().error is None
    assert len(submitted) == last_on_the_loop


def test_a_thread_that_nobody_takes_along_goes_to_the_loop(broker, monkeypatch) -> None:
    monkeypatch.setattr(company, "LOOKED_AFTER", 0.01)
    with led(broker):
        (thread,) = gather(broker, sender(broker))
        assert thread.ended().error is None
    broker.send_to_queue("q", 2)
    assert Thread(sender(broker)).ended().error is None
    assert not company_of(broker)._gathered
    assert broker.stats("q").ready == 3


def test_a_thread_that_goes_to_the_loop_calls_the_next(broker, monkeypatch) -> None:
    ours = company_of(broker)
    assert ours._leading.acquire(timeout=PATIENCE)
    monkeypatch.setattr(company, "LOOKED_AFTER", 3 * PATIENCE)
    (next_one,) = gather(broker, sender(broker, "next"))
    monkeypatch.setattr(company, "LOOKED_AFTER", 1.0)
    (leaves,) = gather(broker, sender(broker, "leaves"))
    ours._leading.release()  # and calls nobody
    assert leaves.ended().error is next_one.ended().error is None
    assert broker.stats("q").ready == 2


def test_a_call_from_the_midst_of_another_waits_for_nobody_there(broker) -> None:
    """As a `__del__` makes one, wherever the collector runs."""
    ours = company_of(broker)

    def call() -> None:
        ours._here.is_calling = True
        broker.send_to_queue("q", "from the midst")
        assert not ours._gathered

    with led(broker):
        assert Thread(call).ended().error is None
    assert broker.stats("q").ready == 1


@pytest.mark.parametrize("handler", [signal.SIG_DFL, lambda *_: None], ids=["no handler", "a handler"])
def test_the_main_thread_takes_part_unless_a_handler_of_signals_may_run_in_it(broker, handler) -> None:
    ours, jobs = company_of(broker), engine_of(broker)._jobs
    submitted = submissions(broker)
    leading = threading.Event()

    def lead() -> None:
        with led(broker), jobs.thread._busy:
            leading.set()
            until(lambda: ours._gathered or submitted)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        thread = Thread(lead)
        assert leading.wait(PATIENCE)
        broker.send_to_queue("q", 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert thread.ended().error is None
    assert len(submitted) == (0 if handler is signal.SIG_DFL else 1)
    assert broker.stats("q").ready == 1


def test_what_is_received_for_a_thread_that_was_interrupted_meanwhile_is_given_back(broker, monkeypatch) -> None:
    monkeypatch.setattr(company, "LOOKED_AFTER", 0.01)
    broker.send_to_queue("q", 1)
    with led(broker) as ours:
        (thread,) = gather(broker, lambda: broker.receive_from_queue("q", lease=900.0))
        (ours._taken,) = [list(ours._gathered)]
        assert ours._taken[0].taken.acquire(timeout=PATIENCE)
        assert session_of(door_of(broker)).all_at_once([ours._taken[0].operation], ours._results)
        interrupt(thread)
        assert isinstance(thread.ended().error, Interrupt)
        ours._answer(ours._results)
    until(lambda: broker.stats("q").leased == 0)
    assert broker.stats("q").ready == 1


def test_threads_whose_leader_was_interrupted_as_it_committed_are_told_what_helps(broker) -> None:
    broker.send_many("q", ["held", "waits"])
    held = broker.receive_from_queue("q", lease=900.0)
    ours = company_of(broker)
    others: list[Thread] = []

    def send() -> object:
        return broker.send_to_queue("q", "sent", message_id="mine")

    def do_and_be_interrupted() -> None:
        session: Any = ours._session
        do = session.all_at_once

        def done(*asked: Any) -> bool:
            assert do(*asked)
            del session.all_at_once
            raise Interrupt

        with led(broker):
            others.extend(gather(broker, send, lambda: broker.receive_from_queue("q", lease=900.0), held.ack))
            ours._call_next = lambda: None  # type: ignore[method-assign]
        del ours._call_next
        session.all_at_once = done
        broker.send_to_queue("q", "the leader's")

    assert isinstance(Thread(do_and_be_interrupted).ended().error, Interrupt)
    errors = [thread.ended().error for thread in others]
    assert {type(error) for error in errors} == {EngineUnavailable}
    sent, received, acked = map(str, errors)
    assert "send it again with the same message_id" in sent
    assert cast("Any", send()).duplicate
    assert "receive again" in received
    until(lambda: broker.stats("q").leased == 0)
    assert "LeaseLost may then mean that it was" in acked
    with pytest.raises(LeaseLost):
        held.ack()
    assert broker.stats("q").ready == 3


@untraced
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # its first step needed more room
@pytest.mark.parametrize("whose", ["a leader's", "the main thread's"])
def test_a_stack_that_is_full_ends_the_call_that_meets_its_end_and_no_other(broker, whose, monkeypatch) -> None:
    monkeypatch.setattr(company, "LOOKED_AFTER", 0.02)
    ours = company_of(broker)
    outcomes: Counter[str] = Counter()

    def end(left: int) -> None:
        """Make a call with so many frames left, and lead the call of another thread with it."""
        with led(broker):
            others = gather(broker, sender(broker))
            monkeypatch.setattr(ours, "_call_next", lambda: None)
        monkeypatch.delattr(ours, "_call_next")
        try:
            with_frames_left(left, sender(broker))
            outcomes["done"] += 1
        except RecursionError:
            outcomes["ended"] += 1
        assert others[0].ended().error is None

    for left in range(1, 80, 2):
        if whose == "the main thread's":
            end(left)
        else:
            assert Thread(partial(end, left)).ended().error is None, left
    assert set(outcomes) == {"done", "ended"}
    assert Thread(sender(broker)).ended().error is None
    assert not ours._gathered


@untraced
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # met between its making and its first step
@pytest.mark.parametrize("call", ["send", "receive"])
def test_whatever_instruction_of_the_leader_is_interrupted_the_others_get_their_answer(
    broker, call, monkeypatch
) -> None:
    monkeypatch.setattr(company, "LOOKED_AFTER", 0.02)
    ours = company_of(broker)
    outcomes: Counter[str] = Counter()

    def do() -> object:
        return broker.send_to_queue("q", 1) if call == "send" else broker.receive_from_queue("q")

    def play(at: int) -> None:
        """Be interrupted at an instruction while two others, who gathered before, are led by this thread."""
        broker.send_to_queue("q", "to be received")
        with led(broker):
            others = gather(broker, sender(broker), lambda: broker.receive_from_queue("q", lease=900.0))
            ours._call_next = lambda: None  # type: ignore[method-assign]
        del ours._call_next
        interrupted(do, at)
        for thread in others:
            outcomes[type(thread.ended().error).__name__] += 1
            if thread.error is None and isinstance(thread.result, filao.sync.Message):
                thread.result.ack()

    broker.send_to_queue("q", 1)
    total = Thread(lambda: instructions(do)).ended().result
    assert isinstance(total, int)
    for at in range(1, 2 * total, max(1, total // 150)):
        assert Thread(partial(play, at)).ended().error is None, at
        assert ours._leading.acquire(timeout=PATIENCE), at
        ours._leading.release()
    assert set(outcomes) == {"NoneType", "EngineUnavailable"}
    assert outcomes["NoneType"] > outcomes["EngineUnavailable"]
    ends = time.monotonic() + PATIENCE
    while (stats := broker.stats("q")).leased or stats.ready:  # what came for an interrupted call is given back
        assert time.monotonic() < ends
        message = broker.receive_from_queue("q", wait=0.1)
        if message is not None:
            with suppress(LeaseLost):
                message.ack()
    assert stats.sent == stats.acked


@untraced
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # met at the end of a victim
def test_threads_that_are_interrupted_at_random_lose_nothing_of_others(broker) -> None:
    confirmed: Counter[str] = Counter()
    ends = threading.Event()

    def victim() -> None:
        while not ends.is_set():
            with suppress(Interrupt, EngineUnavailable):
                while not ends.is_set():
                    broker.send_to_queue("q", "victim's")
                    message = broker.receive_from_queue("q", wait=0)
                    if message is not None:
                        with suppress(LeaseLost):
                            message.ack()

    def bystander(name: str) -> None:
        for _ in range(400):
            try:
                broker.send_to_queue("q", name)
                confirmed[name] += 1
            except EngineUnavailable as error:
                assert "same message_id" in str(error)  # noqa: PT017 - in a thread
                confirmed["in doubt"] += 1

    victims = [Thread(victim) for _ in range(4)]
    bystanders = [Thread(partial(bystander, name)) for name in ("a", "b", "c")]
    chance = random.Random(1)
    while any(thread.is_alive() for thread in bystanders):
        victims = [thread if thread.is_alive() else Thread(victim) for thread in victims]  # met between two calls
        interrupt(chance.choice(victims))
        ends.wait(0.001)
    ends.set()
    for thread in bystanders:
        assert thread.ended().error is None
    for thread in victims:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert confirmed["a"] + confirmed["b"] + confirmed["c"] + confirmed["in doubt"] == 1_200
    stats = broker.stats("q")
    assert stats.sent >= 1_201 - confirmed["in doubt"]
    assert stats.sent == stats.ready + stats.leased + stats.acked
    assert company_of(broker)._leading.acquire(timeout=PATIENCE)
