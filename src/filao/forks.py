"""Forks: what a process lets go of before it forks, and what a child may do with what it inherits.

SQLite's locks belong to a process, and a child does not inherit them. But the library in the child believes that it
holds them, writes without them, and destroys what others confirmed. (https://www.sqlite.org/howtocorrupt.html, section
2.6) So no SQLite file may be open across a fork. Every job on a file runs inside the `gate`. Before a fork the gate is
shut and the files are closed; parent and child open them again for their next job. A socket stays open in the parent;
the child cuts off its own end, so that nothing the child writes, not even a goodbye, reaches the parent's session.

The module relies on nothing of ours. `session.py` registers the hooks; the engines say what they hold.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, Protocol, TypeVar

M = TypeVar("M")

WITHIN = 30.0  # seconds that a fork waits for jobs and transactions to end: the bound of every wait
INTERRUPTED_WITHIN = 2.0  # seconds more for a job that was interrupted then
LOOKED_IN_WITHIN = 0.1  # seconds more for threads that have just entered, and leave again when they see the fork
_INHERITED: list[object] = []  # kept alive in a child, where closing them would disturb the parent


class Living(Generic[M]):
    """Objects for as long as they live. Any thread may add one, or let go of one, while another goes through them.

    A `weakref.WeakSet` bears that only since Python 3.14; before, going through it raises, and no file would be closed
    before the fork.
    """

    def __init__(self) -> None:
        self._references: set[weakref.ref[M]] = set()

    def __iter__(self) -> Iterator[M]:
        for reference in self._references.copy():  # which no other thread can interrupt
            one = reference()
            if one is not None:
                yield one

    def add(self, one: M) -> None:
        """Keep it among the others until it is collected or discarded."""
        self._references.add(weakref.ref(one, self._references.discard))

    def discard(self, one: M) -> None:
        """Keep it no longer; harmless if it is not there."""
        self._references.discard(weakref.ref(one))


class Storage(Protocol):
    """What must be let go before a fork."""

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction of the user's is open, for which the jobs of others wait."""
        ...

    @property
    def loop_thread(self) -> int:
        """The thread whose loop its jobs come from: while that one forks, none of its transactions can end."""
        ...

    def interrupt(self) -> None:
        """Make the running statement fail. May be called from any thread."""

    def leave(self) -> None:
        """Close everything and undo an open transaction. Called in the thread that forks, while no job runs."""

    def inherit(self) -> None:
        """In the child: forget what is the parent's."""


class Connected(Protocol):
    """Something that holds sockets to a server: they stay open in the parent, which goes on using them."""

    def inherit(self) -> None:
        """In the child: cut off its ends of them."""


class Gate:
    """Admits either jobs or a fork, never both; a thread in a job may step out while it waits for another process."""

    def __init__(self) -> None:
        self._storages: Living[Storage] = Living()
        self._connected: Living[Connected] = Living()
        self._renew()

    def _renew(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside: set[int] = set()
        """The threads that run jobs."""
        self._is_wanted = False
        """A thread is about to fork: no job may begin, except those of a transaction that the fork waits for."""
        self._is_shut = False

    def watch(self, storage: Storage) -> None:
        """Close it before every fork from now on. Call this inside the gate."""
        self._storages.add(storage)

    def connect(self, connected: Connected) -> None:
        """Let the child cut itself off from it after every fork from now on."""
        self._connected.add(connected)

    def enter(self, storage: Storage | None = None) -> None:
        """Begin a job on a storage, or go on with one that has no transaction open.

        It takes no lock while nobody forks: a thread first enters and then looks, so the thread that shuts sees it.
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
        """Begin a job unless somebody is forking; return whether it began."""
        self._inside.add(threading.get_ident())
        if self._is_wanted:
            self.leave()
            return False
        return True

    def leave(self) -> None:
        """End a job, if one has begun."""
        self._inside.discard(threading.get_ident())
        if self._is_wanted:
            with self._changed:
                self._changed.notify_all()

    def is_inside(self, thread: int) -> bool:
        """Return whether a thread is running a job."""
        return thread in self._inside

    @contextmanager
    def outside(self) -> Generator[None]:
        """Step out of a job that has no transaction open, to wait for another process.

        A fork may happen meanwhile; after it no file is open.
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
        """Before a fork: wait until no job runs and no transaction is open, then close all files.

        A transaction that cannot end while this thread waits, such as its own (`in_transaction`), is not waited for.
        What has not ended after 30 s is interrupted and undone.
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
                for storage in self._storages:
                    storage.interrupt()
                self._changed.wait(0.01)
            self._is_shut = True
            is_free = self._changed.wait_for(lambda: not self._inside, LOOKED_IN_WITHIN)
        if is_free:
            for storage in self._storages:
                storage.leave()

    def open(self) -> None:
        """After a fork, in the parent: let jobs in again."""
        with self._changed:
            self._is_wanted = self._is_shut = False
            self._changed.notify_all()

    def inherit(self) -> None:
        """After a fork, in the child: forget what is the parent's, and the threads, which exist only there."""
        self._renew()
        for storage in self._storages:
            storage.inherit()
        for connected in self._connected:
            connected.inherit()
        self._storages, self._connected = Living(), Living()


gate: Gate = Gate()


def keep(inherited: object) -> None:
    """Keep an object alive in a child for good: collecting it could close what is the parent's."""
    _INHERITED.append(inherited)


def cut_off(descriptor: Callable[[], int]) -> None:
    """Replace a child's end of a socket by /dev/null: whatever uses it or closes it politely reaches nobody."""
    with suppress(Exception):  # it was closed before; each library says so with an error of its own
        number = descriptor()
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nothing, number, inheritable=False)
        os.close(nothing)
