"""Lone calls of the blocking twin, done in the thread that makes them: nothing is left of one that is interrupted."""

import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import filao
import filao.sync
from filao.broker import session_of
from filao.engine import Draft, Receive, Send
from filao.engines.sqlite import files
from filao.engines.sqlite.engine import SqliteEngine
from filao.engines.sqlite.turnstile import is_passable
from filao.sync import door_of
from tests.support.instructions import instructions, interrupted

FULL = 2  # SQLite's number for PRAGMA synchronous = FULL
PATIENCE = 20.0  # seconds after which a call that never returns fails its test


def engine_of(broker: filao.sync.Broker) -> SqliteEngine:
    engine = session_of(door_of(broker)).engine
    assert isinstance(engine, SqliteEngine)
    return engine


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # met between its making and its first step
@pytest.mark.parametrize("call", ["send", "receive", "ack"])
def test_whatever_instruction_is_interrupted_nothing_is_left_of_a_lone_call(tmp_path, call: str) -> None:
    path = tmp_path / "lone.db"
    with filao.sync.connect(path, durability="relaxed") as broker:
        broker.declare(filao.Queue("q", lease=1.0))
        broker.send_to_queue("q", "known")
        broker.receive_from_queue("q").ack()
        held: list[filao.sync.Message[Any]] = []

        def do() -> object:
            if call == "send":
                return broker.send_to_queue("q", 1)
            if call == "receive":
                return broker.receive_from_queue("q")
            return held[-1].ack()

        def prepare() -> None:
            if call != "send":
                broker.send_to_queue("q", 1)
            if call == "ack":
                held.append(broker.receive_from_queue("q"))

        prepare()
        total = instructions(do)
        for at in range(1, total, max(1, total // 150)):
            prepare()
            interrupted(do, at)
            engine = engine_of(broker)
            assert engine._jobs.thread._busy.acquire(timeout=PATIENCE), at
            assert not engine._database.is_in_transaction, at
            assert not engine._database.hold.turnstile.is_held, at
            engine._jobs.thread._busy.release()
        assert is_passable(path.with_name("lone.db-filao"), PATIENCE)
        other = threading.Thread(target=broker.send_to_queue, args=("q", "after"), daemon=True)
        other.start()
        other.join(PATIENCE)
        assert not other.is_alive()
        settle_all(broker)
        stats = broker.stats("q")
        assert (stats.leased, stats.ready, stats.sent) == (0, 0, stats.acked + stats.dead)


def test_what_is_sent_after_an_interrupted_receive_is_flushed(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "flushed.db") as broker:
        broker.declare(filao.Queue("q"))
        hold = engine_of(broker)._hold
        assert hold.db is not None
        for at in range(1, instructions(lambda: hold.set_durable(durable=False))):
            hold.set_durable(durable=True)
            interrupted(lambda: hold.set_durable(durable=False), at)
            hold.set_durable(durable=True)
            assert hold.db.execute("PRAGMA synchronous").fetchone() == (FULL,), at


def settle_all(broker: filao.sync.Broker) -> None:
    """Receive and ack until nothing is held by anybody: what came for an interrupted call is given back soon."""
    while (stats := broker.stats("q")).ready or stats.leased:
        message = broker.receive_from_queue("q", wait=1)
        if message is not None:
            with suppress(filao.LeaseLost):
                message.ack()


def test_an_interrupt_undoes_no_transaction_that_began_after_another_program_was_in_the_way(tmp_path) -> None:
    path = tmp_path / "locked.db"
    with filao.sync.connect(path) as broker, closing(sqlite3.connect(path, isolation_level=None)) as other:
        broker.declare(filao.Queue("q"))
        broker.send_to_queue("q", "known")
        engine = engine_of(broker)
        other.execute("BEGIN IMMEDIATE")
        assert not session_of(door_of(broker)).at_once(Send("q", [Draft(0, b"")]), [])
        other.execute("ROLLBACK")
        with broker.transaction() as transaction:
            transaction.send_to_queue("q", "in it")
            with suppress(KeyboardInterrupt):
                engine._jobs.thread.visit(interrupt)
        assert broker.stats("q").sent == 2


def test_a_second_interrupt_while_the_first_is_mended_leaves_nothing_either(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "twice.db", durability="relaxed") as broker:
        broker.declare(filao.Queue("q"))
        broker.send_to_queue("q", "known")
        engine = engine_of(broker)
        lock: Any = engine._jobs.thread._busy
        left = 0

        def begin_and_meet_ctrl_c() -> bool:
            assert engine._database.try_begin(durable=False) is not None
            sys.settrace(trace)
            return interrupt()

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            frame.f_trace_opcodes = frame.f_code.co_name in ("mend", "leave")
            left -= event == "opcode"
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        for at in range(1, 40, 3):
            left = at
            with suppress(KeyboardInterrupt):
                engine._jobs.thread.visit(begin_and_meet_ctrl_c)
            sys.settrace(None)
            assert not lock._is_owned(), at
            assert not engine._database.hold.turnstile.is_held, at
        assert broker.send_to_queue("q", "after").id


@pytest.mark.parametrize("has_turn", [False, True])
def test_a_call_behind_one_that_stands_still_in_another_thread_is_told_so(tmp_path, monkeypatch, has_turn) -> None:
    with filao.sync.connect(tmp_path / "still.db") as broker:
        broker.declare(filao.Queue("q"))
        engine = engine_of(broker)
        stands, ends = threading.Event(), threading.Event()

        def stand_still() -> bool:
            books = engine._database.try_begin(durable=True) if has_turn else None
            stands.set()
            assert ends.wait(PATIENCE)
            if books is not None:
                engine._database.commit(books)
            return True

        other = threading.Thread(target=engine._jobs.thread.visit, args=(stand_still,))
        other.start()
        assert stands.wait(PATIENCE)
        with monkeypatch.context() as patched:
            patched.setattr(files, "BUSY_TIMEOUT", 0.05)
            for call in (lambda: broker.send_to_queue("q", 1), lambda: broker.stats("q")):
                with pytest.raises(filao.EngineUnavailable, match="another thread of this process"):
                    call()
        ends.set()
        other.join(PATIENCE)
        assert broker.stats("q").sent == 0
        broker.send_to_queue("q", 2)
        assert broker.receive_from_queue("q").body == 2


def interrupt() -> bool:
    """Stand for a call that meets Ctrl-C."""
    raise KeyboardInterrupt


HANDLED = """
import os, signal, sys
import filao, filao.sync
from tests.support.instructions import instructions, stopped_at

def handle(*_):
    broker.send_to_queue("q", "handled")
    broker.stats("q")
    if hasattr(os, "fork"):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)

with filao.sync.connect(sys.argv[1], durability="relaxed") as broker:
    broker.declare(filao.Queue("q"))
    broker.send_to_queue("q", "known")
    signal.signal(signal.SIGINT, handle)
    send = lambda: broker.send_to_queue("q", "interrupted")
    total, sends = instructions(send), 6
    for at in range(1, sends + 1):
        stopped_at(send, at * total // (sends + 1), lambda: signal.raise_signal(signal.SIGINT))
    stats = broker.stats("q")
    assert (stats.ready, stats.sent) == (2 * sends + 2,) * 2, stats
"""


def test_a_signals_handler_may_call_the_broker_and_fork_in_the_middle_of_a_lone_call(tmp_path) -> None:
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    script = [sys.executable, "-c", HANDLED, tmp_path / "handled.db"]
    subprocess.run(script, env=os.environ | {"PYTHONPATH": path}, timeout=PATIENCE, check=True)


def test_nothing_is_received_after_a_broker_that_closes_has_given_back_what_it_held(tmp_path, monkeypatch) -> None:
    path = tmp_path / "closing.db"
    with filao.sync.connect(path) as broker:
        broker.declare(filao.Queue("q"))
        broker.send_many("q", ["held", "waits"])
        broker.receive_from_queue("q")
        session, jobs = session_of(door_of(broker)), engine_of(broker)._jobs
        end, received = jobs.end, []

        def receive_and_end(last: Any) -> Any:
            received.append(session.all_at_once([Receive("q", 1)], []))  # as a thread that called before the end
            return end(last)

        monkeypatch.setattr(jobs, "end", receive_and_end)
    assert received == [False]
    with filao.sync.connect(path) as another:
        assert another.stats("q").ready == 2
