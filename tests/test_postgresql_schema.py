"""PostgreSQL's schema: a database that was built by another Filao must be told from one that was built by this one."""

import hashlib
from importlib import resources

from filao.engines.postgresql import schema

DIGESTS = {11: "2cb7167420251a5e"}
"""The digest of the SQL of the newest version."""


def digest() -> str:
    """Return the digest of all that a database is built from."""
    folder = resources.files("filao.engines.postgresql")
    files = [folder / "schema.sql", *(folder / "functions" / f"{name}.sql" for name in schema.FUNCTIONS)]
    text = b"".join(file.read_bytes() for file in files) + repr(sorted(schema.STEPS.items())).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def test_a_change_of_the_sql_is_a_new_version_of_the_schema() -> None:
    assert {schema.VERSION: digest()} == DIGESTS, (
        "the SQL has changed, and databases that were built before do not know: raise VERSION in schema.py, with a step "
        f"for what is stored, and write down {{{schema.VERSION}: {digest()!r}}} here"
    )


def test_every_version_has_a_step() -> None:
    assert sorted(schema.STEPS) == list(range(2, schema.VERSION + 1))
