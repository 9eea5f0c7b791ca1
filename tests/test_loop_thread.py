"""How a blocking broker that is left open ends with the interpreter."""

import textwrap
import time
from contextlib import suppress

import pytest

import filao
from filao.engines.sqlite import files
from filao.loop_thread import LoopThread
from tests.support.instructions import stopped_at
from tests.support.programs import attempts, db, run

__all__ = ["db"]


ENDS = {
    "end of the script": ("pass", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an uncaught exception": ("raise KeyError(1)", 1),
    "sys.exit in a thread": ("threading.Thread(target=sys.exit).start()", 0),
    "daemon threads that wait": (
        """
        broker.receive_many("claims", 9)
        for _ in range(3): threading.Thread(target=lambda: broker.receive_from_queue("claims"), daemon=True).start()
        time.sleep(0.1)
        """,
        0,
    ),
    "daemon threads that send": (
        """
        def send():
            while True:
                broker.send_to_queue("other", 1)
        broker.declare(filao.Queue("other"))
        broker.receive_many("claims", 9)
        for _ in range(3): threading.Thread(target=send, daemon=True).start()
        time.sleep(0.1)
        """,
        0,
    ),
    "a daemon thread in a transaction": (
        """
        def hold():
            with broker.transaction() as tx:
                tx.execute("SELECT 1")
                inside.set()
                time.sleep(1000)
        inside = threading.Event()
        threading.Thread(target=hold, daemon=True).start()
        inside.wait()
        """,
        0,
    ),
    "a thread that is not done": (
        """
        def work():
            time.sleep(0.3)
            broker.send_to_queue("claims", 3)
        threading.Thread(target=work).start()
        """,
        0,
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_broker_that_is_left_open_closes_itself_when_the_interpreter_ends(db, how) -> None:
    ending, code = ENDS[how]
    program = f"""
broker = filao.sync.connect(url)
broker.open()
message = broker.receive_from_queue("claims")
{textwrap.dedent(ending)}
"""
    began = time.monotonic()
    run(db, program, code)
    assert time.monotonic() - began < 20  # it does not wait for a bound to run out
    assert attempts(db) == [1] * (4 if how == "a thread that is not done" else 3)
    assert [path.name for path in files.sidecar(db).iterdir() if path.is_fifo()] == []


def test_a_broker_that_a_process_of_multiprocessing_leaves_open_closes_itself(db) -> None:
    program = """
def receive():
    broker = filao.sync.connect(url)
    broker.open()
    broker.receive_many("claims", 2)

child = multiprocessing.get_context("fork").Process(target=receive)
child.start()
child.join()
sys.exit(child.exitcode)
"""
    run(db, program, 0)
    assert attempts(db) == [1] * 3


def test_a_broker_that_is_left_open_on_a_server_closes_itself_too(url) -> None:
    program = """
        broker = filao.sync.connect(url)
        broker.open()
        broker.declare(claims)
        broker.send_to_queue(claims, 1)
        broker.receive_from_queue(claims)
    """
    run(url, program)
    assert attempts(url) == [1]


@pytest.mark.parametrize("where", ["threading.Thread.start", "threading.Event.wait"])
def test_a_broker_that_was_interrupted_while_its_thread_began_keeps_no_other_from_closing(db, where) -> None:
    program = f"""
        def interrupt(frame, event, _):
            if event == "call" and frame.f_code is {where}.__code__:
                sys.setprofile(None)
                raise KeyboardInterrupt
        sys.unraisablehook = lambda _: os._exit(9)  # which is told what atexit meets
        broker = filao.sync.connect(url)
        broker.open()
        message = broker.receive_from_queue("claims")
        other = filao.sync.connect(url)
        sys.setprofile(interrupt)
        try:
            other.open()
        except KeyboardInterrupt:
            say("interrupted")
    """
    assert run(db, program) == ["interrupted"]
    assert attempts(db) == [1] * 3


def test_two_threads_that_wait_for_the_same_end_share_its_error(db) -> None:
    """One that closes a broker, and the interpreter's end, say."""
    thread = LoopThread(filao.connect(db))
    thread.start()
    thread.stop()
    thread.join()
    taken = [0]  # at which instruction the other took it

    def take() -> None:
        taken.append(at)
        thread._error = None

    at = 0
    while taken[-1] == at:
        at += 1
        thread._error = filao.EngineUnavailable("away")
        with suppress(filao.EngineUnavailable):
            stopped_at(thread.join, at, take)
    assert at > 5
