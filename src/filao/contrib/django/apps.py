"""The Django application: it declares queues after migrations, opens the broker, and checks the settings."""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

from collections.abc import Iterator
from typing import Any

from django.apps import AppConfig
from django.core.checks import Tags, register
from django.core.signals import request_started
from django.db import connections
from django.db.backends.signals import connection_created
from django.db.models.signals import post_migrate
from django.utils.module_loading import import_string

from filao.contrib.django.checks import check
from filao.contrib.django.configuration import configured, database
from filao.contrib.django.joining import broker, close_before_databases_go, open_before_views
from filao.queue import Queue


class FilaoConfig(AppConfig):  # type: ignore[misc]  # Django has no types
    """`filao.contrib.django`, in INSTALLED_APPS."""

    name = "filao.contrib.django"
    label = "filao"
    verbose_name = "Filao"

    def ready(self) -> None:
        """Connect the check and the signals."""
        register(check, Tags.database)
        post_migrate.connect(_declare, sender=self)
        request_started.connect(open_before_views, dispatch_uid="filao")
        connection_created.connect(close_before_databases_go, dispatch_uid="filao")


def _declare(*, using: str, **_: Any) -> None:
    queues = list(declared())
    if queues and using == database():
        broker().declare(*queues)
        if connections[using].vendor == "sqlite":
            with connections[using].cursor() as cursor:  # `test --parallel` copies the file without its WAL
                cursor.execute("SELECT count(*) FROM sqlite_schema")  # or it may not know yet that there is one
                cursor.execute("PRAGMA wal_checkpoint")


def declared() -> Iterator[Queue[Any]]:
    """Yield the queues of the settings."""
    for named in configured("QUEUES", ()):
        found = import_string(named.replace(":", "."))
        yield from (found if isinstance(found, (list, tuple)) else [found])
