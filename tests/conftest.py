"""What tests share: a clock that they move, the event loop they run on, and servers, which are started when first
needed.
"""

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings

from filao.broker import session_of
from filao.testing import Clock, filao_broker, filao_clock  # noqa: F401  # fixtures
from tests.support.servers import Postgres, Rabbitmq, has_postgres, has_rabbitmq, postgres_server, rabbitmq_server

untraced = pytest.mark.skipif("COVERAGE_RUN" in os.environ, reason="what interrupts a thread meets the tracer too")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a report be sent from one process to another, whatever text a test has logged: a lone surrogate cannot be."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


LONGEST = (
    *("sandbox_web", "rabbitmq", "sandbox_terminal", "postgresql", "state_machine", "conformance", "docs"),
    *("postgresql_failover", "work", "worker_outages", "forks", "worker_outcomes", "worker_handling", "worker_run"),
    *("processes", "cli", "cli_send", "moving", "faults", "types", "loop_thread", "calls_interrupted", "worker_keeper"),
)
"""The files of tests that take longest, the longest first."""


def pytest_configure() -> None:
    """Let what tests start end by Ctrl-C: a shell without job control has what it starts behind ignore it.

    And let no example of a property fail because the machine was busy.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("whatever it takes", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("whatever it takes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what takes longest begin first, so that no process waits for another's long file at the end."""
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


UVLOOP = ("asyncio", {"use_uvloop": True})
"""The `anyio_backend` of a test that runs under uvloop."""


@pytest.fixture
def anyio_backend() -> object:
    return "asyncio"


def engine_of(broker: Any) -> Any:
    """Look inside: return a broker's engine."""
    return session_of(broker).engine


async def on_connection(broker: Any, method: str, *arguments: Any) -> None:
    """Have a SQLite broker's thread call a method of its connection, such as `set_trace_callback`.

    Another thread would wait there for SQLite's lock and keep Python's, which the callback may be waiting for.
    """
    engine = engine_of(broker)
    await engine._jobs.alone(lambda: getattr(engine._database.hold.db, method)(*arguments))


def missing(what: str) -> NoReturn:
    """Skip what needs a server that is not installed here; where everything must be tested, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed, and CI is set: install it, or run `make test` as root once")
    pytest.skip(f"{what} is not installed here")


def _server_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder that the user whom a server runs as can reach."""
    folder = factory.mktemp(name)
    let_pass(folder)
    return folder / "server"


def let_pass(folder: Path) -> None:
    """Let other users through the folders that lead to this one, as far as they are pytest's."""
    while folder != Path(tempfile.gettempdir()) and folder != folder.parent:
        folder.chmod(0o755)
        folder = folder.parent


_databases = count()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of storage that is fresh, on each engine in turn."""
    if request.param == "sqlite":
        return str(tmp_path / "claims.db")
    server: Postgres = request.getfixturevalue("postgres")
    return server.create(f"claims{next(_databases)}")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Return a PostgreSQL of our own, with a database `filao`."""
    if not has_postgres():
        missing("PostgreSQL")
    with postgres_server(_server_folder(tmp_path_factory, "postgres")) as server:
        server.create("filao")
        yield server


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rabbitmq]:
    """Return a RabbitMQ of our own."""
    if not has_rabbitmq():
        missing("RabbitMQ")
    with rabbitmq_server(tmp_path_factory.mktemp("rabbitmq") / "server") as server:
        yield server
