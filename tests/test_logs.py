"""The log of a worker: what its records carry, and the form that machines read."""

import json
import logging
import sys

import pydantic
import pytest

import filao
from filao.cli import logs
from filao.cli.logs import JsonFormatter, TextFormatter

pytestmark = pytest.mark.anyio


class Claim(pydantic.BaseModel):
    claim_id: int


async def test_each_record_of_a_run_carries_queue_message_and_attempt(tmp_path, caplog) -> None:
    caplog.set_level(logging.DEBUG, "filao.worker")
    worker = filao.Worker(tmp_path / "claims.db")

    @worker.consumer(filao.Queue("claims", max_attempts=1))
    async def handle(message: filao.Message[str]) -> None:
        raise ValueError(message.body)

    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims", max_attempts=1))
        receipt = await broker.send_to_queue("claims", "bad")
        await worker.drain(broker)
    records = [record for record in caplog.records if receipt.id in record.getMessage()]
    assert len(records) == 2
    for record in records:
        written = json.loads(JsonFormatter().format(record))
        assert (written["queue"], written["message_id"], written["attempt"]) == ("claims", receipt.id, 1)
    assert "ValueError: bad" in json.loads(JsonFormatter().format(records[0]))["error"]


@pytest.mark.parametrize(("level", "is_told"), [("info", False), ("debug", True)])
def test_what_rabbitmqs_client_tells_with_tracebacks_is_only_told_to_those_who_debug(level, is_told) -> None:
    clients = [logging.getLogger(name) for name in logs.CLIENTS]
    before = [client.level for client in clients]
    logs.begin(level, "text")
    try:
        assert logging.getLogger("aiormq.connection").isEnabledFor(logging.ERROR) is is_told
    finally:
        for client, was in zip(clients, before, strict=True):
            client.setLevel(was)


async def test_a_malformed_body_is_told_on_one_line_with_why(tmp_path, caplog) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        receipt = await broker.send_to_queue("claims", {"claim_id": "seven \x1b[2J"})
        assert await broker.receive_from_queue(filao.Queue("claims", Claim), wait=0) is None
    (record,) = [record for record in caplog.records if receipt.id in record.getMessage()]
    assert "a dead letter, malformed: the body does not fit the queue's type: 1 validation error" in record.getMessage()
    assert record.getMessage().isprintable()
    written = json.loads(JsonFormatter().format(record))
    assert (written["queue"], written["message_id"], written["attempt"]) == ("claims", receipt.id, 1)


def test_a_record_stays_on_one_line_whatever_stands_in_it() -> None:
    record = logging.LogRecord("filao", logging.WARNING, "", 0, "two\nlines \x1b[2J %s", ("\ud800",), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "\x1b" not in line


def test_a_record_whose_arguments_do_not_fit_is_json_all_the_same() -> None:
    record = logging.LogRecord("app", logging.WARNING, "", 0, "%d claims", ("x",), None)
    assert "%d claims ('x',)" in json.loads(JsonFormatter().format(record))["text"]


class Mute:
    """A value of a program's own that cannot be printed."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(("said", "arguments"), [("%s", (Mute(),)), ("%(a)s", ({"a": Mute()},)), (Mute(), None)])
def test_a_record_is_json_whatever_its_arguments_raise(said, arguments) -> None:
    record = logging.LogRecord("app", logging.WARNING, "", 0, said, arguments, None)
    assert "whose repr raised RuntimeError" in json.loads(JsonFormatter().format(record))["text"]


@pytest.mark.parametrize("value", [float("nan"), Mute(), {("a", 1): 2}, ["\ud800"], b"claims"])
def test_a_field_of_a_record_is_json_whatever_a_program_puts_there(value) -> None:
    record = logging.makeLogRecord({"msg": "paid", "queue": value, "attempt": 1, "stack_info": "Stack\n  File"})
    written = json.loads(JsonFormatter().format(record), parse_constant=pytest.fail)
    assert (type(written["queue"]), written["attempt"]) == (str, 1)
    assert written["stack"] == "Stack\n  File"


def test_nothing_in_a_text_for_people_acts_on_a_terminal_or_passes_for_a_record() -> None:
    forged = "2026-01-01 00:00:00,000 1 INFO message 7 of 'claims': acked"
    try:
        raise ValueError(f"bad \x1b]0;title\x07\u202e\n{forged}")
    except ValueError:
        trace = sys.exc_info()
    record = logging.LogRecord("filao", logging.WARNING, "", 0, "message %s failed", (f"7\x1b[2J\n{forged}",), trace)
    first, *more = TextFormatter("info").format(record).split("\n")
    assert "WARNING message 7\\x1b[2J" in first
    assert [line for line in more if not line.startswith("    ")] == []
    assert all(line.isprintable() for line in (first, *more))
    assert "    ValueError: bad \\x1b]0;title" in "\n".join(more)
