"""What the settings say: the queue's URL, and which of Django's databases it is in."""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from filao.engine import Engine
from filao.engines import engine_for, located, sqlite_path
from filao.urls import has_scheme

KEYS = ("URL", "DATABASE", "QUEUES", "WORKER", "DURABILITY")
_PASSED_ON = ("sslmode", "sslrootcert", "sslcert", "sslkey", "service")  # OPTIONS that libpq reads and a URL can hold
_POSTGRESQL_PORT = "5432"


def configured(key: str, default: Any = None) -> Any:
    """Return a value of the setting FILAO."""
    return getattr(settings, "FILAO", {}).get(key, default)


def database() -> str:
    """Return the alias of the database whose transactions count."""
    return str(configured("DATABASE", "default"))


def queue_url() -> "str | Path":
    """Return the URL of the queue: that of the settings, or that of the database itself."""
    url: str | Path | None = configured("URL")
    return url_of(database()) if url is None else url


def queue_engine() -> Engine:
    """Return an engine on the queue, not yet open."""
    return engine_for(located(queue_url()), durability=configured("DURABILITY", "full"))


def url_of(alias: str) -> "str | Path":
    """Return the URL of one of Django's databases; in tests, that of the test's database."""
    connection = connections[alias]
    given = connection.settings_dict
    if connection.vendor == "sqlite":
        if connection.is_in_memory_db():
            raise ImproperlyConfigured(
                f"Filao cannot keep a queue in the database {alias!r}, which is in memory and no other process sees: "
                f'name a file, in tests too ("TEST": {{"NAME": BASE_DIR / "test.sqlite3"}}), or another place, as '
                f'FILAO["URL"]'
            )
        return Path(given["NAME"])
    if connection.vendor == "postgresql":
        user = quote(given["USER"], safe="")
        secret = f":{quote(given['PASSWORD'], safe='')}" if given["PASSWORD"] else ""
        query = {name: given["OPTIONS"][name] for name in _PASSED_ON if name in given["OPTIONS"]}
        host, port = str(given["HOST"]), f":{given['PORT']}" if given["PORT"] else ""
        if host.startswith("/"):  # the folder of a socket
            query["host"], host = host, ""
        account = f"{user}{secret}@" if user else ""
        return f"postgresql://{account}{host}{port}/{quote(given['NAME'], safe='')}" + (
            f"?{urlencode(query)}" * bool(query)
        )
    raise ImproperlyConfigured(
        f"Filao cannot keep a queue in the database {alias!r}, which is {connection.vendor}: name a place as "
        'FILAO["URL"]'
    )


def aliases_at(url: "str | Path") -> list[str]:
    """Return the aliases of the database that holds the queue, FILAO["DATABASE"] first.

    There may be several, for different options of its connections, say.
    """
    found = [str(alias) for alias in connections if _is_same(connections[alias], url)]
    return sorted(found, key=lambda alias: alias != database())


def _is_same(connection: Any, url: "str | Path") -> bool:
    given = connection.settings_dict
    if connection.vendor == "sqlite" and not _is_server(url):
        file = sqlite_path(url)
        return not connection.is_in_memory_db() and file.resolve() == Path(given["NAME"]).resolve()
    if connection.vendor == "postgresql" and isinstance(url, str) and url.lower().startswith("postgres"):
        parts = urlsplit(url)
        return (parts.hostname or "", str(parts.port or _POSTGRESQL_PORT), unquote(parts.path[1:])) == (
            "" if str(given["HOST"]).startswith("/") else given["HOST"],
            str(given["PORT"] or _POSTGRESQL_PORT),
            given["NAME"],
        )
    return False


def _is_server(url: "str | Path") -> bool:
    return isinstance(url, str) and has_scheme(url) and not url.lower().startswith("sqlite:")
