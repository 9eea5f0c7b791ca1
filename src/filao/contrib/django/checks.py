"""What `manage.py check --database` says of the setting FILAO."""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

from collections.abc import Iterable, Iterator
from typing import Any

from django.conf import settings
from django.core.checks import Error, Warning  # noqa: A004  # Django's own name
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.utils import ConnectionDoesNotExist
from django.utils.module_loading import import_string

from filao.broker import connect
from filao.codec import shown
from filao.contrib.django.configuration import KEYS, aliases_at, configured, queue_url
from filao.errors import FilaoError
from filao.queue import Queue
from filao.worker.worker import Worker


def check(app_configs: Any, databases: Any = None, **_: Any) -> list[Any]:
    """Return what is wrong with the settings."""
    given: object = getattr(settings, "FILAO", {})
    if not isinstance(given, dict):
        return [Error(f"FILAO is {type(given).__name__}; it must be a dict.", id="filao.E001")]
    problems = [
        Error(f"FILAO has no {key!r}.", hint=f"It may hold {', '.join(KEYS)}.", id="filao.E001")
        for key in sorted(set(given) - set(KEYS))
    ]
    try:
        connect(queue_url())  # opens nothing
        aliases = aliases_at(queue_url())
    except (ImproperlyConfigured, ConnectionDoesNotExist, FilaoError, KeyError) as error:
        return [*problems, Error(str(error), id="filao.E002")]
    return [*problems, *_of_names(), *_of_databases(aliases)]


def _of_names() -> Iterator[Any]:
    """Say which queues and worker that the setting names are not what they should be."""
    queues = configured("QUEUES", ())
    if isinstance(queues, str):
        yield Error(f'FILAO["QUEUES"] is the text {queues!r}; it must be a list of such texts.', id="filao.E001")
        queues = ()
    for named in queues:
        yield from _of_name(named, Queue)
    if worker := configured("WORKER"):
        yield from _of_name(worker, Worker)


def _of_name(named: str, kind: type) -> Iterator[Any]:
    try:
        found = import_string(named.replace(":", "."))
    except (ImportError, ImproperlyConfigured) as error:
        yield Error(f"FILAO names {named!r}, which cannot be imported: {error}", id="filao.E003")
        return
    several = found if kind is Queue and isinstance(found, (list, tuple)) else [found]
    if not all(isinstance(one, kind) for one in several):
        yield Error(f"FILAO names {named!r}, which is {shown(found)} and no {kind.__name__}.", id="filao.E003")


def _of_databases(aliases: Iterable[str]) -> Iterator[Any]:
    """Warn of databases that hold the queue and begin their transactions as reads."""
    for alias in aliases:
        mode = connections[alias].settings_dict["OPTIONS"].get("transaction_mode") or ""
        if connections[alias].vendor == "sqlite" and str(mode).upper() not in ("IMMEDIATE", "EXCLUSIVE"):
            yield Warning(
                f"The database {alias!r} holds Filao's queue too, and its transactions begin as reads: one that sends "
                "after it has read fails when another process has written meanwhile.",
                hint='Set DATABASES[…]["OPTIONS"]["transaction_mode"] = "IMMEDIATE" (Django 5.1 and newer).',
                id="filao.W001",
            )
