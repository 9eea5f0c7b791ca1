"""PostgreSQL as an engine: the verbs are functions in the database (`functions.sql`); `engine.py` calls them in batches."""

from filao.engines.postgresql.engine import PostgresqlEngine

__all__ = ["PostgresqlEngine"]
