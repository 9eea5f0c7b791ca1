"""PostgreSQL: what is done to Filao's tables, and beside them, by those whose database it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.orm import Session

import filao
from tests.support.servers import Postgres

pytestmark = pytest.mark.anyio

_names = count()


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Return the URL of an empty database."""
    return postgres.create(f"operators{next(_names)}")


@contextmanager
def alchemy(url: str, *, kind: type) -> Iterator[Any]:
    """Give a connection or a session of SQLAlchemy's that commits each statement."""
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() if kind is sqlalchemy.Connection else Session(engine) as held:
            yield held
    finally:
        engine.dispose()


@pytest.mark.parametrize("kind", [sqlalchemy.Connection, Session])
async def test_a_sqlalchemy_connection_that_commits_each_statement_is_not_joined(url, kind) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with alchemy(url, kind=kind) as held:
            with pytest.raises(filao.ConfigurationError, match=r"holds no transaction.*AUTOCOMMIT"):
                await broker.send_to_queue("claims", 1, within=held)
            held.rollback()
        assert (await broker.stats("claims")).sent == 0
