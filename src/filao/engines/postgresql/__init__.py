"""PostgreSQL as an engine: the verbs are functions in the database (`functions/`), called by `engine.py`."""

from importlib import import_module

from filao.extras import Extra

with Extra("filao[postgresql]", of="a postgresql:// URL"):
    import_module("psycopg")  # of all modules here

from filao.engines.postgresql.engine import PostgresqlEngine

__all__ = ["PostgresqlEngine"]
