"""PostgreSQL as an engine: the verbs are functions in the database (`functions/`), called by `engine.py`."""

from filao.engines.postgresql.engine import PostgresqlEngine

__all__ = ["PostgresqlEngine"]
