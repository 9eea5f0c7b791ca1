"""The waiting list: who is called, in which order, and what is kept for it."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import pytest

import filao
from filao.engine import Draft, Receive, Received, Send
from filao.engines.sqlite import operators, verbs
from filao.engines.sqlite import processes as processes_module
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.presence import Presence

QUEUE = filao.Queue("claims", lease=1000)


class Process:
    """One of several processes that have the file open, as far as the file can tell."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.database = Database(path, durable=False, clock=clock, wake=lambda _: None)
        self.database.open()
        self.presence = Presence(self.database)
        self.lessee = self.presence.enter("a test")
        with self.database.write(durable=False) as books:
            operators.declare(books, QUEUE)

    def send(self, count: int, delay: float = 0.0) -> None:
        with self.database.write(durable=False, keeps=True) as books:
            verbs.apply(books, [Send("claims", [Draft(0, b"1", delay=delay)] * count)], self.lessee)

    def look(self, limit: int = 1, waiting: int = 1) -> tuple[int, float | None]:
        """Return how many messages were found, and the seconds until more is due."""
        with self.database.write(durable=False, keeps=True) as books:
            (received,) = verbs.apply(books, [Receive("claims", limit, waiting=waiting)], self.lessee)
        return len(cast("Received", received).deliveries), cast("Received", received).due_in

    def was_called(self) -> bool:
        assert self.database.hold.belfry.own is not None
        return bool(self.database.hold.belfry.own.heard())

    def close(self) -> None:
        self.database.close()


@pytest.fixture
def processes(tmp_path, clock) -> Generator[list[Process]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Process(tmp_path / "claims.db", clock))) for _ in range(4)]


def called(processes: list[Process]) -> list[bool]:
    return [process.was_called() for process in processes]


def test_as_many_are_called_as_the_messages_need(processes) -> None:
    *waiting, sender = processes
    for process in waiting:
        process.look(limit=2, waiting=2)
    sender.send(2)
    assert called(waiting) == [True, False, False]
    sender.send(3)
    assert called(waiting) == [False, True, True]


def test_who_does_not_wait_is_not_called(processes) -> None:
    passer_by, waiting, _, sender = processes
    passer_by.look(waiting=0)
    waiting.look()
    sender.send(1)
    assert called([passer_by, waiting]) == [False, True]


def test_who_finds_one_for_two_that_wait_is_called_for_the_next(processes) -> None:
    waiting, *_, sender = processes
    sender.send(1)
    assert waiting.look(limit=2, waiting=2)[0] == 1
    sender.send(1)
    assert waiting.was_called()


def test_those_who_waited_longest_are_called_first(processes) -> None:
    first, second, _, sender = processes
    second.look()
    first.look()
    sender.send(1)
    assert called([first, second]) == [False, True]
    second.look()
    second.look()  # nothing more: behind the other now
    sender.send(1)
    assert called([first, second]) == [True, False]


def test_a_process_that_comes_by_does_not_take_what_another_was_called_for(processes) -> None:
    waiting, busy, _, sender = processes
    waiting.look()
    sender.send(1)
    found, due_in = busy.look()
    assert found == 0
    assert due_in == pytest.approx(0.1)
    assert waiting.look()[0] == 1


def test_who_has_called_another_leaves_it_what_it_was_called_for(processes, clock) -> None:
    waiting, sender, *_ = processes
    waiting.look()
    sender.send(1)
    assert sender.look()[0] == 0
    clock.advance(0.101)
    assert sender.look()[0] == 1


def test_what_nobody_was_called_for_is_there_for_the_next(processes) -> None:
    waiting, busy, _, sender = processes
    waiting.look()
    sender.send(3)
    assert busy.look(limit=3)[0] == 2
    assert waiting.look()[0] == 1


def test_a_receive_that_does_not_wait_takes_what_there_is(processes) -> None:
    waiting, busy, _, sender = processes
    waiting.look()
    sender.send(1)
    assert busy.look(waiting=0)[0] == 1


def test_a_promise_to_one_who_does_not_come_runs_out(processes, clock) -> None:
    stopped, busy, _, sender = processes
    stopped.look()
    sender.send(1)
    clock.advance(0.101)
    assert busy.look()[0] == 1


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_promise_does_not_outlive_a_jump_of_the_clock(processes, clock, jump) -> None:
    stopped, busy, _, sender = processes
    stopped.look()
    sender.send(1)
    clock.advance(jump)
    assert busy.look()[0] == 1


def test_who_does_not_come_is_not_waited_for_again_until_it_shows_up(processes, clock) -> None:
    stopped, busy, _, sender = processes
    stopped.look()
    sender.send(1)
    clock.advance(0.101)
    assert busy.look()[0] == 1
    assert called([stopped, busy]) == [True, False]
    for _ in range(3):
        busy.look()
        sender.send(1)
        assert called([stopped, busy]) == [False, True]
        assert busy.look()[0] == 1
    assert stopped.look()[0] == 0
    sender.send(1)
    assert called([stopped, busy]) == [True, False]
    assert busy.look()[0] == 0


def test_a_look_in_vain_writes_nothing(processes) -> None:
    waiting, other, *_ = processes
    waiting.look()
    before = other.presence.has_moved(), other.presence.has_moved()
    for _ in range(3):
        assert waiting.look() == (0, None)
    assert (before, other.presence.has_moved()) == ((True, False), False)
    waiting.look(limit=2)
    assert other.presence.has_moved()


def test_what_is_due_in_a_paused_queue_wakes_nobody_up(processes, clock) -> None:
    waiting, _, _, sender = processes
    sender.send(1, delay=5)
    with sender.database.write(durable=False) as books:
        operators.pause(books, books.queue("claims"), paused=True)
    clock.advance(6)
    assert waiting.look() == (0, None)
    with sender.database.write(durable=False) as books:
        operators.pause(books, books.queue("claims"), paused=False)
    assert called([waiting]) == [True]
    assert waiting.look()[0] == 1


def test_a_process_watches_three_others_and_goes_on_behind_the_dead(processes, clock, tmp_path) -> None:
    with ExitStack() as stack:
        more = [stack.enter_context(closing(Process(tmp_path / "claims.db", clock))) for _ in range(4)]
        everyone = [*processes, *more]
        watcher = everyone[5]
        assert watcher.presence.has_moved()
        assert [process for process, _ in watcher.presence._others] == [7, 8, 1]
        for dead in (everyone[6], everyone[7], everyone[0], everyone[1]):
            assert dead.database.hold.belfry.own is not None
            dead.database.hold.belfry.own.let_go()
        for _ in range(4):
            watcher.presence.bury_some()
        assert [process for process, _ in watcher.presence._others] == [3, 4, 5]


def test_the_leases_of_a_dead_process_are_taken_over_in_slices(processes, monkeypatch) -> None:
    monkeypatch.setattr(processes_module, "LEASES_AT_ONCE", 10)
    dead, watcher, *_, sender = processes
    sender.send(35)
    assert dead.look(limit=35)[0] == 35
    assert dead.database.hold.belfry.own is not None
    dead.database.hold.belfry.own.let_go()
    watcher.presence.has_moved()
    slices = 0
    while watcher.presence.dead():
        watcher.presence.bury_some()
        slices += 1
    assert slices == 4
    assert watcher.look(limit=40)[0] == 35


def test_a_process_that_was_called_in_vain_keeps_its_place(processes) -> None:
    first, second, busy, sender = processes
    first.look()
    second.look()
    sender.send(1)
    assert busy.look(waiting=0)[0] == 1
    assert called([first, second]) == [True, False]
    assert first.look()[0] == 0
    sender.send(1)
    assert called([first, second]) == [True, False]


def test_a_process_that_leaves_some_calls_the_next(processes) -> None:
    first, second, _, sender = processes
    first.look(limit=5)
    second.look()
    sender.send(2)
    assert called([first, second]) == [True, False]
    assert first.look(limit=1)[0] == 1  # it waits for fewer by now
    assert called([first, second]) == [False, True]


def test_each_delayed_message_is_told_to_one(processes) -> None:
    first, second, third, sender = processes
    for process in (first, second, third):
        process.look()
    sender.send(2, delay=5)
    assert called([first, second, third]) == [True, True, False]
    assert first.look()[1] == pytest.approx(5)


def test_a_process_that_was_called_takes_all_it_wants(processes) -> None:
    first, second, _, sender = processes
    first.look(limit=2)
    second.look(limit=2)
    sender.send(3)
    assert second.look(limit=2)[0] == 2
    assert first.look(limit=2)[0] == 1
