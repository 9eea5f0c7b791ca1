"""Under signals: a handler's exception or Ctrl-C at any moment of a blocking call."""

import pytest

from tests.conftest import untraced
from tests.support.programs import db, run

__all__ = ["db"]


ROUNDS = 1_000  # of each call; ten thousand were run by hand


@untraced
@pytest.mark.parametrize("call", ["send", "receive", "ack", "transaction", "stats", "consume", "open"])
def test_an_exception_from_a_signals_handler_leaves_nothing_behind(db, call) -> None:
    program = f"""
        class Interrupt(Exception): pass
        armed = [False]
        def interrupt(*_):
            if armed[0]: raise Interrupt
        signal.signal(signal.SIGALRM, interrupt)
        broker = filao.sync.connect(url)
        broker.open()
        broker.purge("claims")
        def transact():
            with broker.transaction() as tx:
                tx.execute("SELECT 1")
                tx.send_to_queue("claims", 1)
        def consume():
            for message in broker.consume("claims", prefetch=2):
                message.ack()
                break
        def reopen():
            broker.close()
            broker.open()
        def fill():
            if {call!r} in ("receive", "ack", "consume"): broker.send_many("claims", range(3))
        calls = dict(send=lambda: broker.send_to_queue("claims", 1), stats=broker.stats, transaction=transact,
            receive=lambda: broker.receive_from_queue("claims", wait=0), consume=consume, open=reopen,
            ack=lambda: broker.receive_from_queue("claims").ack())
        rounds, interrupted = {ROUNDS if call != "open" else ROUNDS // 10}, 0
        for number in range(rounds):
            if number % 50 == 0: fill()
            armed[0] = True
            try:  # again after a while: what meets a finalizer is swallowed
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-3 if {call!r} != "open" else 2e-2), 0.05)
                try:
                    calls[{call!r}]()
                finally:
                    armed[0] = False
            except Interrupt:
                interrupted += 1
            armed[0] = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        broker.open()
        stats = broker.stats("claims")  # it answers: nothing is locked
        with filao.sync.connect(url) as other:
            other.send_to_queue("claims", 1)
        began = time.monotonic()
        broker.close()
        say(interrupted > rounds // 50, time.monotonic() - began < 10)
        with filao.sync.connect(url) as other:
            say(other.stats("claims").leased)
    """
    assert run(db, program) == ["True True", "0"]


@pytest.mark.parametrize("at", ["enters", "is inside", "leaves"])
def test_ctrl_c_at_a_transaction_undoes_it_and_frees_the_file(db, at) -> None:
    held = {
        "enters": "with foreign: pass",
        "is inside": "time.sleep(1000)",
        "leaves": "pass",
    }[at]
    program = f"""
        import sqlite3
        broker = filao.sync.connect(url)
        broker.open()
        blocker = sqlite3.connect(url, isolation_level=None)
        if {at!r} == "enters": blocker.execute("BEGIN IMMEDIATE")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                with broker.transaction() as tx:
                    tx.send_to_queue("claims", "undone or not")
                    {held}
        except KeyboardInterrupt:
            if {at!r} == "enters": blocker.execute("ROLLBACK")
            with filao.sync.connect(url) as other:
                other.send_to_queue("claims", "after")
            began = time.monotonic()
            broker.close()
            say(time.monotonic() - began < 10)
    """
    assert run(db, program) == ["True"]
