"""`filao backup` and `filao restore`: a copy of a queue's file while it is used, and back."""

from pathlib import Path

import click

from filao.cli.shell import addressed, as_json, check_file, file_of, note, print_lines, usage
from filao.engines.sqlite import backup as copies
from filao.errors import ConfigurationError, UnsupportedFeature


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] FILE")
def backup(*, arguments: tuple[str, ...]) -> int:
    """Copy a SQLite queue to FILE, while others use it.

    The copy is of one moment, whole and checked: messages, leases, dead letters, counters, and your own tables. A copy
    made by cp is not. FILE must not exist. Prints {"backup": FILE, "bytes": N}.
    """
    url, (copy,) = addressed(arguments, least=1, most=1)
    _check_copy(copy)
    path = _sqlite_file(url)
    check_file(url)
    print_lines([as_json({"backup": copy, "bytes": copies.back_up(path, Path(copy))})])
    return 0


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] FILE")
@click.option("--replace", is_flag=True, help="Replace the queue's file, which is kept under another name beside it.")
def restore(*, arguments: tuple[str, ...], replace: bool) -> int:
    """Restore a SQLite queue from FILE, which filao backup made.

    Stop the processes that use the queue first: those that go on notice it, and confirm nothing until they open it
    again. Prints {"restored": PATH, "replaced": PATH or null}.
    """
    url, (copy,) = addressed(arguments, least=1, most=1)
    _check_copy(copy)
    path = _sqlite_file(url)
    if path.exists() and not replace:
        raise ConfigurationError(
            f"{path} exists. To put {copy} in its place, and keep it under another name, give --replace"
        )
    kept = copies.restore(Path(copy), path)
    print_lines([as_json({"restored": str(path), "replaced": str(kept) if kept else None})])
    if kept is not None:
        note(
            f"the file that was replaced is {kept}; remove it, and what lies beside it, when it is not needed any more"
        )
    return 0


def _check_copy(copy: str) -> None:
    if copy == "-":
        raise usage("a copy is a file, and goes through no pipe: give its path (of a file of this name: ./-)")


def _sqlite_file(url: str) -> Path:
    path = file_of(url)
    if path is None:
        raise UnsupportedFeature(
            "backup and restore are of SQLite files. PostgreSQL has pg_dump and pg_basebackup for its databases; "
            "RabbitMQ copies its quorum queues to several nodes, and has no backup of messages: filao move carries "
            "them elsewhere"
        )
    if str(path) == ":memory:":
        raise ConfigurationError("a queue in memory ends with its process, and has no backup: give the path of a file")
    return path
