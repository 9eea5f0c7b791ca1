"""Which Pythons `make matrix` finds, and what it installs there."""

import sys
from pathlib import Path

import pytest

from tests import matrix

STANDS_FOR = """#!{python}
import os, sys, sysconfig
sys.version_info = type("Version", (), dict(major=3, minor={minor}))
asked = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: int({free}) if name == "Py_GIL_DISABLED" else asked(name)
exec(sys.argv[2])
"""
"""A Python that says of itself to be another."""


def python(path: Path, minor: int, *, free: bool = False) -> str:
    path.parent.mkdir(parents=True)
    path.write_text(STANDS_FOR.format(python=sys.executable, minor=minor, free=free))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def pyenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "versions"


def test_the_newest_of_each_version_is_found(pyenv) -> None:
    python(pyenv / "3.13.9" / "bin" / "python", 13)
    newest = python(pyenv / "3.13.10" / "bin" / "python", 13)
    assert dict(matrix.interpreters()) == {"3.13": newest}


def test_a_free_threaded_python_is_none_of_the_others(pyenv) -> None:
    free = python(pyenv / "3.14.2t" / "bin" / "python", 14, free=True)
    assert dict(matrix.interpreters()) == {"3.14t": free}
    usual = python(pyenv / "3.14.1" / "bin" / "python", 14)
    assert dict(matrix.interpreters()) == {"3.14": usual, "3.14t": free}
    python(pyenv.parent / "bin" / "python3.14t", 14)  # by its name only
    assert dict(matrix.interpreters()) == {"3.14": usual, "3.14t": free}


def test_what_has_no_wheel_for_a_free_threaded_python_is_replaced_there() -> None:
    assert [need for need in matrix.needs("3.14") if need.startswith("psycopg")] == ["psycopg[binary]>=3.2.1"]
    assert [need for need in matrix.needs("3.14t") if need.startswith("psycopg")] == ["psycopg>=3.2.1"]
    assert {need for need in matrix.needs("3.14t") if "psycopg" not in need} <= set(matrix.needs("3.14"))
