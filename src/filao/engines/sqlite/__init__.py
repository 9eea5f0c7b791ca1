"""SQLite as an engine: `engine.py` on the event loop, `database.py` in its thread, the verbs in SQL."""

from filao.engines.sqlite.engine import SqliteEngine

__all__ = ["SqliteEngine"]
