"""Forks: what a process lets go of before it forks, and what a child may do with what it inherits.

SQLite's locks belong to a process, and a child does not inherit them; but the library in the child believes that it
has them, writes without, and loses what others confirm. (https://www.sqlite.org/howtocorrupt.html, section 2.6) So
nothing of SQLite's may be open across a fork. Every job on a file runs inside the `gate`; before a fork it is shut,
what is open is let go, and parent and child open it again at their next job. A socket stays open in the parent; the
child cuts its own end off, so that neither words nor a farewell of the child's can reach the parent's session.

The module relies on nothing of ours. `broker.py` registers the hooks; the engines say what they hold.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Protocol

WITHIN = 30.0  # seconds that a fork waits for jobs and transactions to end: the bound of every wait
INTERRUPTED_WITHIN = 2.0  # seconds more for a job that was interrupted then
LOOKED_IN_WITHIN = 0.1  # seconds more for those who entered, and leave because they see that somebody forks
_INHERITED: list[object] = []  # what a child must never close, and the collector must not either


class Storage(Protocol):
    """What must be let go before a fork."""

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction of the user's is open, which the jobs of others wait for."""
        ...

    @property
    def loop_thread(self) -> int:
        """The thread whose loop its jobs come from: while it forks, none of its transactions can end."""
        ...

    def interrupt(self) -> None:
        """Let the statement that runs fail. From any thread."""

    def leave(self) -> None:
        """Let go of all, undoing a transaction; from the thread that forks, while no job runs."""

    def inherit(self) -> None:
        """Forget in the child what is the parent's."""


class Connected(Protocol):
    """What holds sockets to a server: they stay open in the parent, which goes on using them."""

    def inherit(self) -> None:
        """Cut off the child's ends of them."""


class Gate:
    """Lets jobs in, and a fork when there are none; a thread in a job may step out while it waits for others."""

    def __init__(self) -> None:
        self._storages: weakref.WeakSet[Storage] = weakref.WeakSet()
        self._connected: weakref.WeakSet[Connected] = weakref.WeakSet()
        self._renew()

    def _renew(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside: set[int] = set()
        """The threads that run jobs."""
        self._is_wanted = False
        """A thread is about to fork: no job may begin, but for those of a transaction that it waits for."""
        self._is_shut = False

    def watch(self, storage: Storage) -> None:
        """Let go of it before every fork from now on; to be called inside."""
        self._storages.add(storage)

    def connect(self, connected: Connected) -> None:
        """Let a child cut itself off from it after every fork from now on."""
        self._connected.add(connected)

    def enter(self, storage: Storage | None = None) -> None:
        """Begin a job on a storage, or go on with one that has no transaction open.

        Without a lock, while nobody forks: who enters first and looks then is seen by who shuts.
        """
        self._inside.add(threading.get_ident())
        if not self._is_wanted:
            return
        with self._changed:
            self._inside.discard(threading.get_ident())
            self._changed.notify_all()
            while self._is_shut or (self._is_wanted and not (storage is not None and storage.is_in_transaction)):
                self._changed.wait()
            self._inside.add(threading.get_ident())

    def try_enter(self) -> bool:
        """Begin a job unless somebody forks just now; return whether it was begun."""
        self._inside.add(threading.get_ident())
        if self._is_wanted:
            self.leave()
            return False
        return True

    def leave(self) -> None:
        """End a job, if one was begun."""
        self._inside.discard(threading.get_ident())
        if self._is_wanted:
            with self._changed:
                self._changed.notify_all()

    def is_inside(self, thread: int) -> bool:
        """Return whether a thread runs a job just now."""
        return thread in self._inside

    @contextmanager
    def outside(self) -> Generator[None]:
        """Step out of a job that has no transaction open, to wait for another process.

        A fork may happen meanwhile, after which nothing is open.
        """
        if threading.get_ident() not in self._inside:
            yield
            return
        self.leave()
        try:
            yield
        finally:
            self.enter()

    # --- the fork ----------------------------------------------------------------------------------------------------

    def shut(self, *, in_transaction: bool) -> None:
        """Before a fork: wait until no job runs and no transaction is open, and let go of all that is.

        A transaction that cannot end while this thread waits, as when it is this thread's (`in_transaction`), is not
        waited for. What has not ended after 30 s is interrupted and undone.
        """
        with self._changed:
            while self._is_wanted:  # another thread forks
                self._changed.wait()
            self._is_wanted = True
            here = threading.get_ident()

            def is_quiet() -> bool:
                waits = not in_transaction and any(
                    storage.is_in_transaction and storage.loop_thread != here for storage in self._storages
                )
                return not self._inside and not waits

            self._changed.wait_for(is_quiet, WITHIN)
            until = time.monotonic() + INTERRUPTED_WITHIN
            while self._inside and time.monotonic() < until:
                for storage in list(self._storages):
                    storage.interrupt()
                self._changed.wait(0.01)
            self._is_shut = True
            is_free = self._changed.wait_for(lambda: not self._inside, LOOKED_IN_WITHIN)
        if is_free:
            for storage in list(self._storages):
                storage.leave()

    def open(self) -> None:
        """After a fork, in the parent: let jobs in again."""
        with self._changed:
            self._is_wanted = self._is_shut = False
            self._changed.notify_all()

    def inherit(self) -> None:
        """After a fork, in the child: forget what is the parent's, and the threads that there are none of."""
        self._renew()
        for storage in list(self._storages):
            storage.inherit()
        for connected in list(self._connected):
            connected.inherit()
        self._storages, self._connected = weakref.WeakSet(), weakref.WeakSet()


gate: Gate = Gate()


def keep(inherited: object) -> None:
    """Keep in a child what it must never let go of: collecting it could close what is the parent's."""
    _INHERITED.append(inherited)


def cut_off(descriptor: Callable[[], int]) -> None:
    """Replace a child's end of a socket by nothing: whatever closes it politely, or goes on using it, reaches
    nobody.
    """
    with suppress(Exception):  # it was closed before, in whatever way its library says so
        number = descriptor()
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nothing, number, inheritable=False)
        os.close(nothing)
