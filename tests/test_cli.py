"""The command line as its users run it: the real program, on real files, through real pipes and terminals."""

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import filao
import filao.sync
from filao.message import delivery_of
from filao.overview import Deed
from filao.sync import inner_of
from tests.conftest import engine_of

FILAO = [sys.executable, "-m", "filao"]
PATIENCE = 30.0  # seconds after which a program that hangs is killed, and its test fails
PIPE_FULL = 200_000  # bytes of a body that no pipe holds, so that writing it waits for a reader
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "FILAO_URL"}
ENVIRONMENT |= {"TERM": "xterm", "COLUMNS": "80"}
AS_SHELLS_DO = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
COLOURS_AND_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Ran:
    """What a program left behind."""

    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def run(*arguments: str | Path, given: bytes = b"", url: str = "", program: list[str] = FILAO, **more: Any) -> Ran:
    done = subprocess.run(
        [*program, *map(str, arguments)],
        input=given,
        stdout=more.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | ({"FILAO_URL": url} if url else {}),
        timeout=PATIENCE,
        check=False,
        **more,
    )
    return Ran(done.returncode, done.stdout or b"", done.stderr.decode())


@contextmanager
def started(*arguments: str | Path, program: list[str] = FILAO, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program beside the test, and leave none behind."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    command = [*program, *map(str, arguments)]
    opened: subprocess.Popen[bytes] = subprocess.Popen(command, env=ENVIRONMENT, bufsize=0, **streams)  # type: ignore[assignment]  # mypy takes streams for text=True
    with opened as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[bytes]") -> bytes:
    """Wait for its next line."""
    assert process.stdout is not None
    line = b""
    while b"\n" not in line:
        assert select.select([process.stdout], [], [], PATIENCE)[0], f"it hangs after {line[:100]!r}"
        came = os.read(process.stdout.fileno(), 65_536)
        assert came, f"it ended, after {line[:100]!r}"
        line += came
    return line.partition(b"\n")[0]


def on_terminal(*arguments: str | Path, types: bytes = b"", when: bytes = b"") -> tuple[int, str]:
    """Run it on a terminal of its own, type something `when` that is shown, and return its exit code and the screen."""
    code, screen = sent_to_terminal(*arguments, types=types, when=when)
    return code, COLOURS_AND_MOVES.sub("", screen)


def sent_to_terminal(*arguments: str | Path, types: bytes = b"", when: bytes = b"") -> tuple[int, str]:
    """Return all that a terminal gets."""
    terminal, inside = pty.openpty()
    screen = b""
    program = [sys.executable, "-S", "-c", AS_SHELLS_DO, *FILAO]  # so that Ctrl-C reaches it
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    with started(*arguments, program=program, start_new_session=True, **streams) as process:
        os.close(inside)
        while select.select([terminal], [], [], PATIENCE)[0]:
            try:
                shown = os.read(terminal, 65_536)
            except OSError:  # Linux's way to say that nobody holds the other side any more
                break
            if not shown:
                break
            screen += shown
            if types and when in screen:
                os.write(terminal, types)
                types = b""
        code = process.wait(PATIENCE)
    os.close(terminal)
    return code, screen.decode()


def run_each(commands: Iterable[Sequence[str | Path]], **more: Any) -> list[Ran]:
    """Run commands at the same time, which saves some of it."""
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda command: run(*command, **more), commands))


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the programs share what Python compiles, wherever this runs: each start takes a quarter less."""
    ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)
    ENVIRONMENT["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def db(tmp_path: Path) -> Path:
    path = tmp_path / "claims.db"
    declare(path)
    return path


def declare(db: Path, name: str = "claims", **rules: Any) -> None:
    with filao.sync.connect(db) as broker:
        broker.declare(filao.Queue(name, **rules))


def put(db: Path, *bodies: object) -> list[str]:
    """Send without the program, which saves its time."""
    with filao.sync.connect(db) as broker:
        return [receipt.id for receipt in broker.send_many("claims", bodies)]


def bury(db: Path, *bodies: object) -> list[str]:
    """Make dead letters of these bodies."""
    ids = put(db, *bodies)
    with filao.sync.connect(db) as broker:
        for message in broker.receive_many("claims", len(bodies), wait=0):
            message.reject("no such policy")
    return ids


def waiting(db: Path) -> list[Any]:
    with filao.sync.connect(db) as broker:
        return [message.body for message in broker.peek("claims", limit=10_000)]


def counted(db: Path, queue: str = "claims") -> filao.QueueStats:
    with filao.sync.connect(db) as broker:
        return broker.stats(queue)


# --- what a command is about -----------------------------------------------------------------------------------------


def test_only_declare_creates_a_file(tmp_path):
    ran = run("stats", "claims.db", cwd=tmp_path)
    assert ran.code == 3
    assert ran.err == "filao: no such file: claims.db. Declare a queue first: filao declare claims.db QUEUE\n"
    assert list(tmp_path.iterdir()) == []
    assert run("declare", "claims.db", "claims", cwd=tmp_path).code == 0
    assert (tmp_path / "claims.db").exists()


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


def test_the_help_lists_the_exit_codes_and_every_command():
    ran = run("--help")
    assert ran.code == 0
    for word in (b"141", b"FILAO_URL", *b"declare send receive peek stats dead redrive purge doctor".split()):
        assert word in ran.out


def test_the_installed_program_is_the_same():
    ran = run("--version", program=[str(Path(sys.executable).with_name("filao"))])
    assert (ran.code, ran.out) == (0, f"filao, version {version('filao')}\n".encode())


def test_without_its_extra_it_says_what_to_install(tmp_path):
    for name in ("filao", "msgspec", "anyio", "idna", "typing_extensions"):
        origin = Path(getattr(find_spec(name), "origin", ""))
        installed = origin.parent if origin.stem == "__init__" else origin
        (tmp_path / installed.name).symlink_to(installed)
    bare = [sys.executable, "-S", "-c", f"import sys; sys.path.append({str(tmp_path)!r}); import filao.cli"]
    ran = run(program=bare)
    assert ran.code == 2
    assert ran.err == "filao: the command line needs click and rich: pip install 'filao[cli]'\n"


# --- bad input -------------------------------------------------------------------------------------------------------


def test_an_undeclared_queue_is_refused_with_its_neighbours(db):
    verbs = ("send", "receive", "peek", "stats")
    for ran in run_each((verb, db, "claim") for verb in verbs):
        assert ran.code == 3
        assert ran.err.startswith("filao: queue 'claim' is not declared. Did you mean 'claims'?")
        assert "Traceback" not in ran.err


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


def test_a_body_that_is_too_large_is_refused_with_its_line(db):
    ran = run("send", db, "claims", given=b'1\n"' + b"x" * 300 * 1024 + b'"\n3\n')
    assert ran.code == 3
    assert "line 2: queue 'claims': the body takes 307,202 bytes and the limit is 262,144" in ran.err
    assert waiting(db) == [1]


def test_a_body_that_is_not_json_is_refused(db):
    ran = run("send", db, "claims", "{claim_id: 7}")
    assert ran.code == 3
    assert "'{claim_id: 7}' is not JSON" in ran.err
    assert waiting(db) == []


def test_no_line_brings_a_traceback(db, tmp_path):
    lines = (b"\xff", b"[" * 100_000, b"NaN", b"1 2")
    for number, line in enumerate(lines):
        (tmp_path / str(number)).write_bytes(line)
    for ran in run_each(("send", db, "claims", "--file", tmp_path / str(number)) for number in range(len(lines))):
        assert ran.code == 3
        assert "filao: line 1: " in ran.err
        assert "Traceback" not in ran.err
    assert waiting(db) == []


def test_a_bad_line_stops_behind_all_that_stand_before_it(db):
    given = b"".join(b"%d\n" % number for number in range(1, 1_501)) + b"{bad\n" + b"0\n" * 100
    ran = run("send", db, "claims", given=given)
    assert ran.code == 3
    assert "line 1501: '{bad' is not JSON" in ran.err
    assert "stored 1,500 messages, lines 1 to 1,500" in ran.err
    assert waiting(db) == list(range(1, 1_501))
    assert len(ran.lines) == 1_500


def test_a_queue_that_is_full_tells_how_far_it_came(db):
    declare(db, max_length=1_500)
    given = b"".join(b"%d\n" % number for number in range(1, 2_001))
    ran = run("send", db, "claims", "--quiet", given=given)
    assert ran.code == 3
    assert "is full" in ran.err
    stored = len(waiting(db))
    assert 1_000 <= stored <= 1_500
    assert f"stored {stored:,} messages, lines 1 to {stored:,}" in ran.err


def test_a_rule_that_cannot_be_is_refused_before_a_file_is_created(tmp_path):
    ran = run("declare", tmp_path / "claims.db", "claims", "--lease", "-1")
    assert ran.code == 3
    assert "lease is -1.0; it must be from 0.001 to 604800 seconds" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_stdin_or_stdout_that_the_shell_closed_is_no_disaster(db):
    put(db, 1)
    shell = ["sh", "-c", f'exec "$@" {">&-"}', "sh", *FILAO]
    ran = run("receive", db, "claims", program=shell)
    assert (ran.code, ran.err) == (4, "filao: stdout: closed\n")
    assert waiting(db) == [1]
    shell = ["sh", "-c", f'exec "$@" {"<&-"}', "sh", *FILAO]
    assert run("send", db, "claims", program=shell).code == 4


# --- declare ---------------------------------------------------------------------------------------------------------


def test_declare_prints_the_rules(tmp_path):
    (rules,) = run("declare", tmp_path / "claims.db", "claims", "--lease", "60", "--backoff-first", "2").lines
    assert rules["name"] == "claims"
    assert (rules["lease"], rules["max_attempts"]) == (60.0, 5)
    assert rules["backoff"] == {"first": 2.0, "factor": 2.0, "ceiling": 300.0, "jitter": 0.5}


def test_declare_keeps_the_rules_that_are_not_given(db):
    run(
        "declare",
        db,
        "claims",
        "--ttl",
        "60",
        "--max-attempts",
        "3",
        "--backoff-factor",
        "3",
        "--overflow",
        "drop_oldest",
    )
    (rules,) = run("declare", db, "claims", "--lease", "90", "--ttl", "none", "--backoff-jitter", "0").lines
    assert (rules["lease"], rules["ttl"], rules["max_attempts"], rules["overflow"]) == (90.0, None, 3, "drop_oldest")
    assert (rules["backoff"]["factor"], rules["backoff"]["jitter"]) == (3.0, 0.0)


def test_every_rule_has_an_option():
    shown = run("declare", "--help").out.decode()
    for rule in filao.Queue.__slots__:
        if rule not in ("name", "body", "backoff"):
            assert f"--{rule.replace('_', '-')} " in shown
    for part in filao.Backoff.__slots__:
        assert f"--backoff-{part} " in shown


# --- send ------------------------------------------------------------------------------------------------------------


def test_send_prints_a_receipt(db):
    terms = [
        "--header",
        "source=portal=1",
        "--group",
        "policy-12",
        "--priority",
        "-5",
        "--ttl",
        "9000",
        "--delay",
        "3600",
    ]
    (receipt,) = run("send", db, "claims", '{"claim_id": 7}', *terms).lines
    with filao.sync.connect(db) as broker:
        (message,) = broker.peek("claims", state="delayed")
    assert receipt == {"id": message.id, "duplicate": False}
    assert message.body == {"claim_id": 7}
    assert (message.headers, message.group, message.priority) == ({"source": "portal=1"}, "policy-12", -5)
    assert message.expires_at is not None
    assert (message.at - message.sent_at).total_seconds() == 3600
    assert (message.expires_at - message.sent_at).total_seconds() == 9000


def test_a_duplicate_is_told_in_the_receipt(db):
    command = ("send", db, "claims", "1", "--message-id", "mine", "--dedup-key", "claim-7")
    receipts = [ran.lines[0] for ran in run_each([command, command])]
    assert [receipt["id"] for receipt in receipts] == ["mine", "mine"]
    assert sorted(receipt["duplicate"] for receipt in receipts) == [False, True]


def test_the_text_of_a_body_is_kept_as_it_was_written(db):
    run("send", db, "claims", '{"amount": 1.10, "policy": 123456789012345678901234567890}')
    with filao.sync.connect(db) as broker:
        message = broker.receive_from_queue("claims", wait=0)
        assert message is not None
        assert delivery_of(inner_of(message)).content == b'{"amount": 1.10, "policy": 123456789012345678901234567890}'


def test_lines_are_sent_in_their_order_and_blank_ones_passed_over(db):
    ran = run("send", db, "claims", given=b'1\r\n\n{"claim_id": 2}\n  \n"three"')
    assert len(ran.lines) == 3
    assert waiting(db) == [1, {"claim_id": 2}, "three"]


def test_a_file_is_loaded_with_one_summary_when_quiet(db, tmp_path):
    (tmp_path / "claims.jsonl").write_bytes(b"".join(b'{"claim_id": %d}\n' % number for number in range(2_500)))
    ran = run("send", db, "claims", "--file", tmp_path / "claims.jsonl", "--quiet")
    assert ran.lines == [{"sent": 2_500, "duplicates": 0}]
    assert ran.err == ""
    assert waiting(db) == [{"claim_id": number} for number in range(2_500)]


def test_raw_lines_are_sent_untouched(db):
    run("send", db, "claims", "--raw", given=b"\xff\xfe\n\n{not json \r\n")
    assert waiting(db) == [b"\xff\xfe", b"", b"{not json \r"]


def test_a_line_is_sent_before_the_next_one_comes(db):
    with started("send", db, "claims", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"1\n2")
        line_of(process)
        assert waiting(db) == [1]
        process.stdin.write(b"\n")
        line_of(process)
        assert waiting(db) == [1, 2]


def test_options_that_contradict_each_other_are_wrong_usage(db):
    sends = [
        ["1", "--messages"],
        ["--raw", "--messages"],
        ["--message-id", "m"],
        ["--header", "x"],
    ]
    receives = [["--all", "--limit", "1"], ["--follow", "--wait", "1"]]
    commands = [("send", db, "claims", *options) for options in sends]
    commands += [("receive", db, "claims", *options) for options in receives]
    assert [ran.code for ran in run_each(commands)] == [2] * len(commands)
    assert counted(db).sent == 0


def test_whole_messages_have_terms_of_their_own(db):
    lines = b"""{"body": 1, "group": "a", "headers": {"x": "1"}}
        {"body": null, "dedup_key": "k"}
        {"body": 3, "dedup_key": "k"}"""
    ran = run("send", db, "claims", "--messages", "--group", "b", "--header", "y=2", given=lines)
    assert [receipt["duplicate"] for receipt in ran.lines] == [False, False, True]
    with filao.sync.connect(db) as broker:
        first, second = broker.peek("claims")
    assert (first.body, first.group, first.headers) == (1, "a", {"x": "1", "y": "2"})
    assert (second.body, second.group, second.headers) == (None, "b", {"y": "2"})


def test_a_line_that_is_no_whole_message_is_refused(db, tmp_path):
    lines = (
        b'{"bodi": 1}',
        b'{"body": 1, "priority": "5"}',
        b'{"body": 1, "bytes": true}',
        b"[]",
        b'{"body": 1, "delay": -1}',
    )
    for number, line in enumerate(lines):
        (tmp_path / str(number)).write_bytes(b'{"body": 0}\n' + line)
    files = [tmp_path / str(number) for number in range(len(lines))]
    for ran in run_each(("send", db, "claims", "--messages", "--file", file) for file in files):
        assert ran.code == 3
        assert "filao: line 2: " in ran.err
    assert waiting(db) == [0] * len(lines)


# --- receive ---------------------------------------------------------------------------------------------------------


def test_receive_takes_one_message_and_acknowledges_it(db):
    first, _ = put(db, {"claim_id": 7}, 8)
    (line,) = run("receive", db, "claims").lines
    assert (line["id"], line["queue"], line["attempt"], line["headers"]) == (first, "claims", 1, {})
    assert (line["body"], line["bytes"]) == ({"claim_id": 7}, False)
    assert (counted(db).acked, waiting(db)) == (1, [8])


def test_bytes_are_received_as_base64_with_a_mark(db):
    put(db, b"\xff", {"base64": "/w=="})
    lines = run("receive", db, "claims", "--all").lines
    assert [(line["body"], line["bytes"]) for line in lines] == [
        ({"base64": "/w=="}, True),
        ({"base64": "/w=="}, False),
    ]


def test_receive_fails_when_there_is_nothing(db):
    ran = run("receive", db, "claims", "--wait", "0.01")
    assert (ran.code, ran.out, ran.err) == (1, b"", "")


def test_receive_stops_at_its_limit_or_when_the_queue_is_empty(db):
    put(db, *range(250))
    assert [line["body"] for line in run("receive", db, "claims", "--limit", "120").lines] == list(range(120))
    assert [line["body"] for line in run("receive", db, "claims", "--all").lines] == list(range(120, 250))
    assert counted(db).acked == 250


def test_bodies_alone_are_printed_raw(db):
    put(db, {"claim_id": 7}, b"\xff\xfe")
    assert run("receive", db, "claims", "--raw", "--all").out == b'{"claim_id":7}\n\xff\xfe\n'


def test_at_most_once_deletes_before_it_prints(db):
    put(db, 1)
    with Path(os.devnull).open("rb") as unwritable:
        assert run("receive", db, "claims", "--at-most-once", stdout=unwritable).code == 4
    put(db, 2, 3)
    assert [line["body"] for line in run("receive", db, "claims", "--at-most-once", "--all").lines] == [2, 3]
    assert counted(db).acked == 3


def test_what_cannot_be_written_is_not_acknowledged(db):
    put(db, 1, 2)
    with Path(os.devnull).open("rb") as unwritable:
        ran = run("receive", db, "claims", "--all", stdout=unwritable)
    assert ran.code == 4
    assert ran.err.startswith("filao: stdout: ")
    stats = counted(db)
    assert (stats.ready, stats.acked, stats.released) == (2, 0, 2)


def test_a_reader_that_goes_away_leaves_the_rest_in_the_queue(db):
    put(db, *("x" * PIPE_FULL for _ in range(3)))
    with started("receive", db, "claims", "--all") as process:
        line_of(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(PATIENCE) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""
    stats = counted(db)
    assert (stats.acked, stats.ready) == (1, 2)
    with filao.sync.connect(db) as broker:
        assert [message.attempts for message in broker.peek("claims")] == [0, 0]


def test_what_a_slow_reader_has_not_taken_goes_back_meanwhile(db):
    put(db, 1, 2, 3)
    impatient = "import filao.cli, sys; sys.modules['filao.cli.receive'].SLOW_AFTER = 0; filao.cli.main()"
    ran = run("receive", db, "claims", "--all", program=[sys.executable, "-c", impatient])
    assert [(line["body"], line["attempt"]) for line in ran.lines] == [(1, 1), (2, 1), (3, 1)]
    stats = counted(db)
    assert (stats.acked, stats.released) == (3, 3)


def test_a_lease_that_ran_out_before_the_reader_came_is_told(db):
    declare(db, lease=0.05)
    put(db, "x" * PIPE_FULL)
    with started("receive", db, "claims") as process, filao.sync.connect(db) as broker:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], PATIENCE)[0]
        message = broker.receive_from_queue("claims", wait=PATIENCE, lease=60)
        assert message is not None
        assert message.attempt == 2
        out, err = process.communicate(timeout=PATIENCE)
        assert json.loads(out)["attempt"] == 1
        assert b"filao: the reader was slower than the lease" in err
        assert process.returncode == 0
        message.ack()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_follow_waits_until_it_is_stopped_and_leaves_nothing_leased(db, number, code):
    with started("receive", db, "claims", "--follow") as process:
        put(db, 1)
        assert json.loads(line_of(process))["body"] == 1
        put(db, 2)
        assert json.loads(line_of(process))["body"] == 2
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    stats = counted(db)
    assert (stats.leased, stats.acked + stats.ready) == (0, 2)
    assert stats.lost == 0


def test_follow_with_a_limit_ends_there(db):
    with started("receive", db, "claims", "--follow", "--limit", "2") as process:
        put(db, 1)
        line_of(process)
        put(db, 2)
        line_of(process)
        assert process.wait(PATIENCE) == 0


# --- pipes -----------------------------------------------------------------------------------------------------------


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


# --- looking and repairing -------------------------------------------------------------------------------------------


def test_peek_pages_through_a_state_and_changes_nothing(db):
    ids = put(db, *range(5))
    options = [("--limit", "2"), ("--after", ids[1]), ("--state", "delayed")]
    first, second, delayed = run_each(("peek", db, "claims", *chosen) for chosen in options)
    assert [line["id"] for line in first.lines] == ids[:2]
    assert [line["body"] for line in second.lines] == [2, 3, 4]
    assert (delayed.code, delayed.out) == (1, b"")
    assert counted(db).ready == 5


def test_dead_letters_tell_why_they_died(db):
    declare(db, "appeals")
    bury(db, {"claim_id": 7}, b"\xff")
    found, none = run_each([("dead", db, "claims"), ("dead", db, "appeals")])
    first, second = found.lines
    assert (first["body"], first["reason"], first["error"]) == ({"claim_id": 7}, "rejected", "no such policy")
    assert [failure["outcome"] for failure in first["history"]] == ["rejected"]
    assert second["body"] == {"base64": "/w=="}
    assert none.code == 1


def test_dead_letters_are_chosen_by_reason_error_age_and_id(db):
    ids = bury(db, *range(3))
    declare(db, "claims", ttl=0.001)
    with filao.sync.connect(db) as broker:
        broker.send_to_queue("claims", 3)
        while broker.receive_from_queue("claims", wait=0) or broker.stats("claims").dead < 4:
            pass
    asked = [
        ("--reason", "expired"),
        ("--error", "NO SUCH"),
        ("--error", "no such", "--limit", "2"),
        ("--older", "3600"),
        ("--younger", "3600"),
        ("--id", ids[1]),
    ]
    found = run_each(("dead", db, "claims", *options) for options in asked)
    assert [[line["body"] for line in ran.lines] for ran in found] == [[3], [0, 1, 2], [0, 1], [], [0, 1, 2, 3], [1]]
    assert "no dead letter of queue 'claims' is what was asked for" in found[3].err


def test_dead_letters_are_a_table_on_a_terminal_and_one_is_told_whole(db):
    (number,) = bury(db, {"claim_id": 7})
    code, screen = on_terminal("dead", db, "claims")
    assert code == 0
    assert re.search(rf"{number}.*rejected.*no such", screen)
    code, screen = on_terminal("dead", db, "claims", "--id", number)
    assert (code, '{"claim_id":7}' in screen, "  no such policy" in screen) == (0, True, True)
    code, screen = on_terminal("dead", db, "claims", "--json")
    assert json.loads(screen)["id"] == number


def test_what_others_wrote_does_nothing_in_a_table_or_a_story(db):
    put(db, "\x1b[2J[red]")
    (number,) = [line["id"] for line in run("peek", db, "claims").lines]
    for options in ((), ("--id", number)):
        code, screen = sent_to_terminal("peek", db, "claims", *options)
        assert code == 0
        assert "\x1b[2J" not in screen
        assert "[red]" in screen


def test_an_empty_result_says_so(db):
    for command, told in [
        ("peek", "queue 'claims' has no ready messages"),
        ("dead", "queue 'claims' has no dead letters"),
    ]:
        ran = run(command, db, "claims")
        assert (ran.code, ran.out) == (1, b"")
        assert told in ran.err


def test_the_hint_names_the_queue_that_was_meant(db, tmp_path):
    assert f"filao declare {db} claim-s." in run("peek", db, "claim-s").err
    assert "c.db claims" in run("peek", tmp_path / "c.db", "claims").err


def test_a_queue_is_paused_and_resumed(db):
    put(db, 7)
    assert run("pause", db, "claims").lines == [{"paused": "claims"}]
    assert run("receive", db, "claims").code == 1
    assert run("resume", db, "claims").lines == [{"resumed": "claims"}]
    assert run("receive", db, "claims").code == 0


def test_a_halted_group_is_resumed(db):
    declare(db, "claims", group_dead="halt")
    with filao.sync.connect(db) as broker:
        broker.send_many("claims", [1, 2], group="policy-12")
        broker.receive_from_queue("claims").reject()
    assert run("receive", db, "claims").code == 1
    assert run("resume", db, "claims", "--group", "policy-12").code == 0
    assert run("receive", db, "claims").lines[0]["body"] == 2


def test_one_message_is_cancelled_while_it_waits(db):
    number, other = put(db, 7, 8)
    first, second = run("cancel", db, "claims", number), run("cancel", db, "claims", number)
    assert (first.code, first.lines) == (0, [{"cancelled": True}])
    assert (second.code, second.lines) == (1, [{"cancelled": False}])
    assert run("cancel", "claims", other, url=str(db)).code == 0


def test_a_queue_is_deleted_with_its_messages_only_when_told(db):
    put(db, 7)
    assert run("delete", db, "claims").code == 2  # nobody can be asked
    assert "holds 1 messages" in run("delete", db, "claims", "--yes").err
    code, screen = on_terminal("delete", db, "claims", "--messages", types=b"n\n", when=b"[y/N]")
    assert (code, "and its 1 messages" in screen) == (1, True)
    assert run("delete", db, "claims", "--messages", "--yes").lines == [{"deleted": "claims"}]
    assert "is not declared" in run("peek", db, "claims").err


def test_redrive_sends_back_all_or_some(db):
    ids = bury(db, *range(4))
    assert run("redrive", db, "claims", "--id", ids[1], "--id", ids[2]).lines == [{"redriven": 2}]
    ones = run_each([("redrive", db, "claims", "--limit", "1")] * 3)
    assert sorted((ran.code, ran.lines[0]["redriven"]) for ran in ones) == [(0, 1), (0, 1), (1, 0)]
    assert waiting(db) == [0, 1, 2, 3]


def test_redrive_tells_of_ids_that_it_did_not_find(db):
    (letter,) = bury(db, 1)
    ran = run("redrive", db, "claims", "--id", letter, "--id", "nonsense")
    assert (ran.code, ran.lines) == (1, [{"redriven": 1}])
    assert "1 of 2 ids" in ran.err


def test_redrive_edits_the_body_of_one(db):
    (letter,) = bury(db, {"claim_id": "seven"})
    command = ("redrive", db, "claims", "--body", '{"claim_id": 7}')
    assert sorted(ran.code for ran in run_each([command, (*command, "--id", letter)])) == [0, 3]
    assert waiting(db) == [{"claim_id": 7}]


def test_redrive_and_discard_choose_a_kind_and_keep_to_a_rate(db):
    ids = bury(db, *range(4))
    assert run("redrive", db, "claims", "--kind", "Other", "--rate", "100").lines == [{"redriven": 0}]
    done = run("redrive", db, "claims", "--kind", "no such policy", "--rate", "100", "--limit", "2")
    assert done.lines == [{"redriven": 2}]
    assert waiting(db) == [0, 1]
    asked, by_id = run_each([("discard", db, "claims", "--reason", "rejected"), ("discard", db, "claims", "--yes")])
    assert (asked.code, by_id.code) == (2, 2)
    assert run("discard", db, "claims", "--id", ids[2], "--yes").lines == [{"discarded": 1}]
    assert (counted(db).dead, counted(db).cancelled) == (1, 1)


def test_the_log_of_the_dashboard_is_printed(db):
    async def note() -> None:
        async with filao.connect(db) as broker:
            kept = engine_of(broker).overview.log
            number = await kept.begin(Deed("ada", "purge", "claims", wanted=2))
            await kept.record(number, 2, "done")

    assert run("log", db).code == 1
    asyncio.run(note())
    (told,) = run("log", db).lines
    assert (told["who"], told["what"], told["wanted"], told["done"], told["outcome"]) == ("ada", "purge", 2, 2, "done")
    assert told["at"] <= told["ended_at"]


def test_purge_asks_and_refuses_where_it_cannot(db):
    put(db, 1, 2)
    asked, of_dead = run_each([("purge", db, "claims"), ("purge", db, "claims", "--state", "dead", "--yes")])
    assert (asked.code, of_dead.lines) == (2, [{"purged": 0}])
    assert "--yes" in asked.err
    assert run("purge", db, "claims", "--yes").lines == [{"purged": 2}]


def test_purge_does_what_is_answered_on_a_terminal(db):
    put(db, 1, 2)
    code, screen = on_terminal("purge", db, "claims", types=b"n\n", when=b"[y/N]")
    assert "Delete 2 waiting messages of queue 'claims'?" in screen
    assert (code, counted(db).ready) == (1, 2)
    code, screen = on_terminal("purge", db, "claims", types=b"y\n", when=b"[y/N]")
    assert (code, counted(db).ready) == (0, 0)
    assert '{"purged":2}' in screen


# --- stats and doctor ------------------------------------------------------------------------------------------------


def test_stats_are_json_lines_in_a_pipe(db):
    declare(db, "appeals")
    put(db, 1, 2)
    every, alone = run_each([("stats", db), ("stats", db, "claims")])
    assert [(line["name"], line["ready"], line["sent"]) for line in every.lines] == [
        ("appeals", 0, 0),
        ("claims", 2, 2),
    ]
    assert [line["name"] for line in alone.lines] == ["claims"]


def test_stats_without_a_queue_found_fail(tmp_path):
    with filao.sync.connect(tmp_path / "empty.db"):
        pass
    assert run("stats", tmp_path / "empty.db").code == 1


def test_stats_are_a_table_on_a_terminal(db):
    put(db, *range(1_234))
    code, screen = on_terminal("stats", db)
    assert code == 0
    assert "───" in screen
    assert "1,234" in screen
    _, screen = on_terminal("stats", db, "claims")
    assert "redriven" in screen


def test_doctor_prints_json_lines_in_a_pipe_or_a_table_on_a_terminal(db):
    db.chmod(0o644)
    ran = run("doctor", db)
    findings = {finding["subject"]: finding["level"] for finding in ran.lines}
    assert (findings["permissions"], findings["integrity"], ran.code) == ("warning", "ok", 0)
    code, screen = on_terminal("doctor", db)
    assert code == 0
    assert "───" in screen
    assert "permissions" in screen


def test_doctor_fails_on_a_damaged_file(db):
    put(db, *("x" * 1_000 for _ in range(100)))
    pages = bytearray(db.read_bytes())
    pages[-4096 * 8 :] = b"\xff" * 4096 * 8
    db.write_bytes(pages)
    ran = run("doctor", db)
    assert ran.code == 1
    assert "error" in {finding["level"] for finding in ran.lines}


# --- terminals -------------------------------------------------------------------------------------------------------


def test_loading_a_file_on_a_terminal_shows_progress_and_a_summary(db, tmp_path):
    (tmp_path / "claims.jsonl").write_bytes(b"7\n" * 3_000)
    code, screen = on_terminal("send", db, "claims", "--file", tmp_path / "claims.jsonl")
    assert code == 0
    assert "sending" in screen
    assert "100%" in screen
    assert "3,000 messages" in screen
    assert '{"sent":3000,"duplicates":0}' in screen
    assert 'duplicate":' not in screen.replace('{"sent":3000,"duplicates":0}', "")


def test_progress_is_drawn_on_stderr_alone(db, tmp_path):
    (tmp_path / "claims.jsonl").write_bytes(b"7\n" * 10)
    terminal, inside = pty.openpty()
    with started("send", db, "claims", "--file", tmp_path / "claims.jsonl", stderr=inside) as process:
        os.close(inside)
        assert process.stdout is not None
        receipts = process.stdout.read().splitlines()
        assert b"sending" in os.read(terminal, 65_536)
        assert process.wait(PATIENCE) == 0
    os.close(terminal)
    assert all(json.loads(receipt)["duplicate"] is False for receipt in receipts)
    assert len(receipts) == 10


def test_lines_are_typed_on_a_terminal_until_it_is_interrupted(db):
    code, screen = on_terminal("send", db, "claims", types=b"7\n\x04", when=b"Ctrl-D ends them")
    assert code == 0
    assert '"duplicate":false' in screen
    code, screen = on_terminal("send", db, "claims", types=b"\x03", when=b"Ctrl-D ends them")
    assert (code, waiting(db)) == (130, [7])
    assert "stored nothing" in screen
    assert "Traceback" not in screen
