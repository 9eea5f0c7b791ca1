"""The broker of a Django project: one for each process and URL, whose sends keep to Django's transactions."""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.transaction import TransactionManagementError
from msgspec.structs import replace

from filao import sync
from filao.broker import connect, session_of
from filao.connections import refused
from filao.contrib.django.configuration import aliases_at, configured, database, queue_url
from filao.draft import Outgoing, drafts
from filao.engine import Draft, Receipt
from filao.errors import FilaoError, MessageTooLarge
from filao.queue import Queue, T, name_of, not_found
from filao.sync import call_on, door_of

_brokers: "dict[str, Broker]" = {}


def broker() -> "Broker":
    """Return the open broker of the setting FILAO, one for each process. It closes itself when the process ends."""
    found = _made()
    found.open()
    return found


def open_before_views(**_: Any) -> None:
    """Open the broker before a view's transaction begins, where both are in one database: it may have to write.

    What prevents that is told to the views that use the queue, and to no others.
    """
    with suppress(FilaoError, ImproperlyConfigured):
        found = _made()
        if found.has_alias:
            found.open()


def close_before_databases_go(*, connection: Any, **_: Any) -> None:
    """Close the brokers in Django's databases when Django connects to none of them: to create, copy or drop one.

    Its tests do so, and PostgreSQL copies and drops none that somebody is connected to. `broker()` opens them again.
    """
    if connection.alias == NO_DB_ALIAS:
        for found in list(_brokers.values()):
            if found.has_alias:
                found.close()


def _made() -> "Broker":
    url = queue_url()
    return _brokers.get(str(url)) or _brokers.setdefault(str(url), Broker(url))  # no lock, for a fork could copy it


class Broker(sync.Broker):
    """A `filao.sync.Broker` whose sends keep to Django's transactions.

    Inside `atomic()` of the queue's own database, a send is part of the transaction. Inside `atomic()` of
    FILAO["DATABASE"], if that is another one, a message is checked at once and sent when the transaction has committed
    (`on_commit`); its receipt already has its id. If that send fails, the end of the block raises its error although
    the block's own work is committed: what must not be lost then belongs into a `filao.Outbox`. Everywhere else a
    message is sent at once.

    (Only this one of our classes inherits from another, because it must be a `filao.sync.Broker` in all else.)
    """

    def __init__(self, url: Any) -> None:
        super().__init__(connect(url, durability=configured("DURABILITY", "full")))
        self._aliases = aliases_at(url)
        self.has_alias: bool = bool(self._aliases)
        """Whether the queue lies in one of Django's databases."""
        self._rules: dict[str, Queue[Any]] = {}

    def send_to_queue(  # type: ignore[misc]  # final for all heirs but this one
        self,
        queue: str | Queue[T],
        body: T,
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        dedup_key: str | None = None,
        ttl: float | None = None,
        message_id: str | None = None,
        within: object = None,
    ) -> Receipt:
        """See `filao.Broker.send_to_queue`, and the class."""
        outgoing = Outgoing(
            body,
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            dedup_key=dedup_key,
            ttl=ttl,
            message_id=message_id,
        )
        return self.send_many(queue, [outgoing], within=within)[0]

    def send_many(  # type: ignore[misc]  # final for all heirs but this one
        self,
        queue: str | Queue[T],
        bodies: Iterable[T | Outgoing[T]],
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        ttl: float | None = None,
        within: object = None,
    ) -> list[Receipt]:
        """See `filao.Broker.send_many`, and the class."""
        terms: Outgoing[Any] = Outgoing(None, headers=headers, delay=delay, priority=priority, group=group, ttl=ttl)
        all_bodies: list[Any] = [body if isinstance(body, Outgoing) else replace(terms, body=body) for body in bodies]
        joined, is_ours = (within, True) if within is not None else self._transaction()
        if joined is None or is_ours:
            return super().send_many(queue, all_bodies, within=joined)
        _check_can_commit(joined)
        fit = self._drafts(queue, all_bodies)
        sent = [replace(one, message_id=one.message_id or _fresh_id()) for one in fit]
        self._send_on_commit(joined, name_of(queue), sent)
        return [Receipt(str(one.message_id), duplicate=False) for one in sent]

    def _transaction(self) -> tuple[Any, bool]:
        """Return the connection whose transaction a send belongs to, if any, and whether that is the queue's own."""
        for alias in self._aliases:
            if connections[alias].in_atomic_block:
                return connections[alias], True
        other = connections[database()]
        return (other if other.in_atomic_block else None), False

    def _drafts(self, queue: str | Queue[Any], messages: list[Outgoing[Any]]) -> list[Draft]:
        """Return messages drafted by a queue's rules; if a body is too large for known rules, ask for them again."""
        none: Outgoing[None] = Outgoing(None)
        name = name_of(queue)
        given = queue if isinstance(queue, Queue) else None
        rules = self._rules  # other threads put theirs in its place
        if name in rules:
            try:
                return drafts(given or rules[name], messages, none)
            except MessageTooLarge:
                pass
        rules = self._rules = {declared.name: declared for declared in self.queues()}
        if name not in rules:
            raise not_found(name, rules)
        return drafts(given or rules[name], messages, none)

    def _send_on_commit(self, connection: Any, name: str, messages: list[Draft]) -> None:
        async def send() -> list[Receipt]:
            session = session_of(door_of(self))
            await session.learned(name)
            return await session.send(name, messages)

        connection.on_commit(partial(call_on, self, send))


def _check_can_commit(connection: Any) -> None:
    """Raise `EngineError` if a transaction of Django's can only be undone, with all that waits for its commit."""
    try:
        connection.validate_no_broken_transaction()
    except TransactionManagementError as error:
        raise refused(error) from error


def _fresh_id() -> str:
    return f"django-{secrets.token_hex(16)}"
