"""PostgreSQL as an engine: the verbs are functions in the database (`functions/`); `engine.py` calls them in
batches.
"""

from filao.engines.postgresql.engine import PostgresqlEngine

__all__ = ["PostgresqlEngine"]
