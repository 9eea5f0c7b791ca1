"""The command line as its users run it: the real program, on real files, through real pipes and terminals."""

import os
import shlex
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import filao
import filao.sync
from filao.cli import commands
from tests.support.shell import (
    FILAO,
    PATIENCE,
    bury,
    compiled,
    counted,
    db,
    declare,
    put,
    run,
    run_each,
    started,
    waiting,
)

__all__ = ["compiled", "db"]


@pytest.mark.parametrize("command", [("verify", "typo.db"), ("move", "typo.db", "other.db"), ("doctor", "typo.db")])
def test_a_file_that_is_not_there_is_not_made_by_a_look_at_it(command, tmp_path):
    ran = run(*command, cwd=tmp_path)
    assert (ran.code, "no such file: typo.db" in ran.err) == (3, True)
    assert list(tmp_path.iterdir()) == []


def test_the_help_says_of_each_command_in_a_whole_sentence_what_it_does():
    listed = run("--help").out.decode().partition("Commands:\n")[2].splitlines()
    assert len(listed) == len(commands.commands)
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


def test_only_declare_creates_a_file(tmp_path):
    ran = run("stats", "claims.db", cwd=tmp_path)
    assert ran.code == 3
    assert ran.err == "filao: no such file: claims.db. Declare a queue first: filao declare claims.db QUEUE\n"
    assert list(tmp_path.iterdir()) == []
    assert run("declare", "claims.db", "claims", cwd=tmp_path).code == 0
    assert (tmp_path / "claims.db").exists()


@pytest.mark.parametrize("command", [("stats",), ("backup", "copy.db")])
def test_a_file_whose_folder_or_disk_is_missing_is_not_to_be_declared(command, tmp_path):
    (tmp_path / "link.db").symlink_to(tmp_path / "disk" / "claims.db")
    name, *others = command
    in_folder, behind_link = run_each([(name, "gone/claims.db", *others), (name, "link.db", *others)], cwd=tmp_path)
    assert (in_folder.code, behind_link.code) == (3, 3)
    assert f"no such file: gone/claims.db. There is no folder {tmp_path / 'gone'}." in in_folder.err
    assert f"It is a link to {tmp_path / 'disk' / 'claims.db'}, where nothing is." in behind_link.err


def test_the_command_of_a_hint_can_be_run_as_it_stands(tmp_path):
    hint = run("stats", "two words.db", "--", "-q", cwd=tmp_path).err.partition("Declare a queue first: ")[2]
    program, *command = shlex.split(hint)
    assert (program, run(*command, cwd=tmp_path).code) == ("filao", 0)
    assert run("stats", "two words.db", cwd=tmp_path).lines[0]["name"] == "-q"


def test_a_url_names_a_file_as_a_path_does(db):
    assert run("stats", "sqlite:///claims.db", cwd=db.parent).lines[0]["name"] == "claims"


def test_the_url_comes_from_the_environment_when_it_is_left_out(db):
    sent = run("send", "claims", "7", url=str(db))
    stats, peeked, findings = run_each([("stats", "claims"), ("peek", "claims"), ("doctor",)], url=str(db))
    assert (sent.code, stats.lines[0]["ready"], peeked.lines[0]["body"], findings.code) == (0, 1, 7, 0)


def test_a_url_that_is_given_goes_before_that_of_the_environment(db, tmp_path):
    put(db, 7)
    commands = [("peek", db, "claims"), ("stats", db), ("send", db, "claims")]
    peeked, stats, sent = run_each(commands, url=str(tmp_path / "other.db"), given=b"8\n")
    assert (peeked.lines[0]["body"], stats.lines[0]["name"], sent.code) == (7, "claims", 0)
    assert waiting(db) == [7, 8]


def test_what_could_be_a_queue_is_one_when_the_environment_has_the_url(db):
    ran = run("stats", "claims.db", url=str(db), cwd=db.parent)
    assert ran.code == 3
    assert "queue 'claims.db' is not declared" in ran.err
    assert "./claims.db" in ran.err


def test_what_is_missing_or_too_much_is_wrong_usage(db, tmp_path):
    commands = [("receive", db), ("receive", db, "claims", "claims"), ("receive", db, "claims", "--bogus")]
    commands += [("send", db, "claims", "--file", tmp_path / "none.jsonl"), ("peek", db, "claims", "--state", "gone")]
    few, many, bogus, no_file, no_state = run_each(commands)
    assert [ran.code for ran in (few, many, bogus, no_file, no_state)] == [2] * 5
    assert "give the URL and the queue; or set FILAO_URL" in few.err
    assert "3 arguments are too many" in many.err
    assert "--bogus" in bogus.err
    assert "none.jsonl" in no_file.err


@pytest.mark.parametrize("command", [["redrive", "--rate"], ["receive", "--wait"], ["top", "--every"]])
def test_what_is_no_number_is_wrong_usage(db, command):
    verb, option = command
    ran = run(verb, db, "claims", f"{option}=nan")
    assert ran.code == 2
    assert "'nan' is no number" in ran.err


def test_the_help_lists_the_exit_codes_and_every_command():
    ran = run("--help")
    assert ran.code == 0
    for word in (b"141", b"FILAO_URL", *b"declare send receive peek stats dead redrive purge doctor".split()):
        assert word in ran.out


def test_the_installed_program_is_the_same():
    ran = run("--version", program=[str(Path(sys.executable).with_name("filao"))])
    assert (ran.code, ran.out) == (0, f"filao, version {version('filao')}\n".encode())


def bare(folder: Path, *names: str) -> list[str]:
    """Return a command line for which nothing is installed: it finds these modules in a folder."""
    for name in ("filao", "msgspec", "typing_extensions", *names):
        origin = Path(getattr(find_spec(name), "origin", ""))
        found = origin.parent if origin.stem == "__init__" else origin
        (folder / found.name).symlink_to(found)
    begin = f"import sys; sys.path.append({str(folder)!r}); from filao.cli import main; main()"
    return [sys.executable, "-S", "-c", begin]


def test_it_tells_its_version_where_it_lies_without_being_installed_as_in_an_archive(tmp_path):
    ran = run("--version", program=bare(tmp_path, "click", "rich", "pygments", "markdown_it", "mdurl"))
    assert (ran.code, ran.out) == (0, f"filao, version {version('filao')}\n".encode()), ran.err


def test_without_its_extra_it_says_what_to_install(tmp_path):
    ran = run(program=bare(tmp_path))
    assert ran.code == 2
    assert ran.err == (
        "filao: the command line needs what cannot be imported here: pip install 'filao[cli]' "
        "(No module named 'click')\n"
    )


def test_an_undeclared_queue_is_refused_with_its_neighbours(db):
    verbs = ("send", "receive", "peek", "stats")
    for ran in run_each((verb, db, "claim") for verb in verbs):
        assert ran.code == 3
        assert ran.err.startswith("filao: queue 'claim' is not declared. Did you mean 'claims'?")
        assert "Traceback" not in ran.err


def test_a_queue_that_cannot_be_is_not_advised_to_be_declared(db, tmp_path):
    commands = [(verb, db, "two words") for verb in ("send", "receive", "peek", "stats")]
    for ran in run_each([*commands, ("move", db, tmp_path / "other.db", "--queue", "two words")]):
        assert ran.code == 3
        assert "'two words'" in ran.err
        assert "declare" not in ran.err


def test_a_folder_is_no_queue(tmp_path):
    ran = run("stats", tmp_path)
    assert ran.code == 3
    assert "is a folder" in ran.err


def test_a_file_that_is_not_a_database_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database")
    ran = run("stats", tmp_path / "notes.txt")
    assert ran.code == 4
    assert "is not a SQLite database" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to what is read-only")
def test_a_read_only_file_is_refused(db):
    db.chmod(0o400)
    ran = run("receive", db, "claims")
    assert ran.code == 3
    assert "read-only" in ran.err


def test_a_private_memory_is_refused_because_it_ends_with_the_command():
    assert run("declare", "sqlite://:memory:", "claims").code == 3


def test_no_line_brings_a_traceback(db, tmp_path):
    lines = (b"\xff", b"[" * 100_000, b"NaN", b"1 2")
    for number, line in enumerate(lines):
        (tmp_path / str(number)).write_bytes(line)
    for ran in run_each(("send", db, "claims", "--file", tmp_path / str(number)) for number in range(len(lines))):
        assert ran.code == 3
        assert "filao: line 1: " in ran.err
        assert "Traceback" not in ran.err
    assert waiting(db) == []


def test_a_stdin_or_stdout_that_the_shell_closed_is_no_disaster(db):
    put(db, 1)
    shell = ["sh", "-c", f'exec "$@" {">&-"}', "sh", *FILAO]
    ran = run("receive", db, "claims", program=shell)
    assert (ran.code, ran.err) == (4, "filao: stdout: closed\n")
    assert waiting(db) == [1]
    shell = ["sh", "-c", f'exec "$@" {"<&-"}', "sh", *FILAO]
    assert run("send", db, "claims", program=shell).code == 4


def pipe(source: list[str], sink: list[str]) -> tuple[int, int]:
    with started(*source) as first, started(*sink, stdin=first.stdout) as second:
        assert first.stdout is not None
        first.stdout.close()
        second.communicate(timeout=PATIENCE)
        return first.wait(PATIENCE), second.returncode


def test_messages_move_to_another_file_through_a_pipe(db, tmp_path):
    other = tmp_path / "other.db"
    with filao.sync.connect(db) as broker:
        broker.send_to_queue("claims", {"claim_id": 7}, group="policy-12", headers={"a": "b"}, priority=3)
        broker.send_to_queue("claims", b"\xff\n\x00")
        broker.send_to_queue("claims", {"base64": "/w=="})
    declare(other)
    assert pipe(["receive", str(db), "claims", "--all"], ["send", str(other), "claims", "--messages"]) == (0, 0)
    assert waiting(db) == []
    with filao.sync.connect(other) as broker:
        moved = broker.peek("claims")
    assert [message.body for message in moved] == [{"claim_id": 7}, b"\xff\n\x00", {"base64": "/w=="}]
    assert (moved[0].group, moved[0].headers, moved[0].priority) == ("policy-12", {"a": "b"}, 3)


def test_bodies_move_within_a_file_through_a_pipe(db):
    declare(db, "archive")
    put(db, *range(300))
    assert pipe(["receive", str(db), "claims", "--all", "--raw"], ["send", str(db), "archive"]) == (0, 0)
    assert (counted(db).acked, counted(db, "archive").ready) == (300, 300)


def test_dead_letters_are_copied_through_a_pipe(db):
    bury(db, {"claim_id": 7})
    declare(db, "triage")
    assert pipe(["dead", str(db), "claims"], ["send", str(db), "triage", "--messages"]) == (0, 0)
    assert (counted(db).dead, counted(db, "triage").ready) == (1, 1)
