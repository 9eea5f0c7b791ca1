"""Metrics of a store as Prometheus reads them, and the alert rules that go with them."""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import filao
import filao.sync
from filao.cli.metrics import Scraper
from filao.cli.shell import read_anew
from filao.engines.sqlite.backup import restore
from filao.errors import EngineUnavailable
from filao.prometheus.store import Figures, StoreCollector, exposition
from tests.conftest import missing

PATIENCE = 60.0  # seconds after which a program that hangs is given up
FILAO = [sys.executable, "-m", "filao"]


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return each sample by its name and the values of its labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Return a file with one ready message, one held, one dead."""
    path = tmp_path / "claims.db"
    with filao.sync.connect(path) as broker:
        broker.declare(filao.Queue("claims"), filao.Queue("documents"), filao.Queue("letters"))
        broker.send_many("claims", range(3))
        broker.receive_from_queue("claims").reject("no")
        broker.receive_from_queue("claims").nack(delay=600)
    return path


def printed(*arguments: str | Path) -> str:
    done = subprocess.run([*FILAO, *map(str, arguments)], capture_output=True, timeout=PATIENCE, check=True)
    return done.stdout.decode()


def test_metrics_are_printed_from_the_store(db) -> None:
    found = samples(printed("metrics", db))
    states = {state: found["filao_queue_messages", "claims", state] for state in filao.State}
    assert states == {"ready": 1, "delayed": 1, "leased": 0, "blocked": 0, "dead": 1}
    assert found["filao_messages_sent_total", "claims"] == 3
    assert found["filao_messages_died_total", "claims", "rejected"] == 1
    assert found["filao_messages_died_total", "claims", "expired"] == 0
    assert found["filao_queue_oldest_age_seconds", "claims", "ready"] > 0
    assert found["filao_store_bytes", "database"] > 0
    assert found[("filao_store_up",)] == 1


def test_queues_are_chosen_by_name_and_what_is_beyond_the_bound_is_counted(db) -> None:
    chosen = samples(printed("metrics", db, "--queue", "claims", "--queue", "let*"))
    assert {queue for name, queue, *_ in (key for key in chosen if len(key) > 1) if name == "filao_queue_paused"} == {
        "claims",
        "letters",
    }
    bounded = samples(printed("metrics", db, "--queues-max", "1"))
    assert ("filao_queue_paused", "documents") not in bounded
    assert bounded[("filao_queues_hidden",)] == 2


def test_the_first_queues_by_name_are_told_however_an_engine_lists_them(db) -> None:
    with filao.sync.connect(db) as broker:
        figures = Figures(broker.stats()[::-1], broker.features)
    text, _ = exposition(StoreCollector(lambda: figures, most=1))
    assert ("filao_queue_paused", "claims") in samples(text.decode())


def test_what_an_engine_does_not_know_is_not_told_as_nought(db) -> None:
    with filao.sync.connect(db) as broker:
        figures = Figures(broker.stats(), frozenset())
    text, error = exposition(StoreCollector(lambda: figures))
    assert error is None
    found = samples(text.decode())
    assert {state for name, queue, state in (key for key in found if len(key) == 3) if queue == "claims"} == {
        "ready",
        "dead",
    }
    assert not [key for key in found if key[0].endswith("_total")]


def test_a_store_that_cannot_be_read_is_not_up() -> None:
    def fail() -> Figures:
        raise EngineUnavailable("away")

    text, error = exposition(StoreCollector(fail))
    assert isinstance(error, EngineUnavailable)
    assert samples(text.decode()) == {("filao_store_up",): 0}


@pytest.mark.anyio
async def test_a_reading_that_came_too_late_is_told_to_the_next_scrape_and_to_no_other(monkeypatch) -> None:
    """With 5,000 queues on a busy machine it took five seconds, and the store was never up."""
    monkeypatch.setattr(sys.modules[Scraper.__module__], "READ_WITHIN", 0.01)
    may_end = threading.Event()

    def read() -> Figures:
        may_end.wait(PATIENCE)
        return Figures([], frozenset())

    scraper, told = Scraper(StoreCollector(read)), list[float]()
    try:
        for _ in range(2):
            told.append(samples((await scraper.answer(b"/metrics")).body.decode())["filao_store_up",])
            may_end.set()
            assert scraper._reading is not None
            await asyncio.wait_for(asyncio.shield(scraper._reading), PATIENCE)
            may_end.clear()
        told.append(samples((await scraper.answer(b"/metrics")).body.decode())["filao_store_up",])
        told.append(samples((await scraper.answer(b"/metrics")).body.decode())["filao_store_up",])
    finally:
        may_end.set()
    assert told == [0, 1, 1, 0]


def test_a_file_that_was_put_in_the_place_of_another_is_read_instead(db) -> None:
    with filao.sync.connect(db) as broker:
        assert len(read_anew(broker, broker.stats)) == 3
        backup = db.with_name("backup.db")
        with filao.sync.connect(backup) as restored:
            restored.declare(filao.Queue("restored"))
        restore(backup, db)
        assert [one.name for one in read_anew(broker, broker.stats)] == ["restored"]


def test_no_empty_file_is_made_by_those_who_watch_one_that_went_away(db) -> None:
    with filao.sync.connect(db) as broker:
        read_anew(broker, broker.stats)
        db.rename(db.with_name("kept.db"))
        db.mkdir()
        with pytest.raises(filao.FilaoError, match="is a folder"):
            read_anew(broker, broker.stats)
        db.rmdir()
        with pytest.raises(filao.EngineUnavailable, match=r"is not there any more\. Nothing was made in its place"):
            read_anew(broker, broker.stats)
        assert not db.exists()
        with filao.sync.connect(db) as anew:
            anew.declare(filao.Queue("anew"))
        assert [one.name for one in read_anew(broker, broker.stats)] == ["anew"]


def test_a_port_in_use_is_told(db) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [*FILAO, "metrics", str(db), "--listen", str(port)], capture_output=True, timeout=PATIENCE, check=False
        )
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr.decode()


def test_the_dashboard_asks_for_metrics_that_there_are(db) -> None:
    dashboard = json.loads(printed("metrics", "--grafana"))
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    there = {key[0] for key in samples(printed("metrics", db))} | {
        *("filao_handler_seconds_bucket", "filao_message_wait_seconds_bucket", "filao_worker_busy_slots")
    }
    words = {word for word in asked.replace("(", " ").replace("{", " ").split() if word.startswith("filao_")}
    assert words <= there


# --- Prometheus itself -----------------------------------------------------------------------------------------------


def program(name: str) -> str:
    found = shutil.which(name)
    return found if found is not None else missing(name)


def test_promtool_accepts_the_rules(tmp_path) -> None:
    (tmp_path / "rules.yml").write_text(printed("metrics", "--rules"))
    subprocess.run([program("promtool"), "check", "rules", tmp_path / "rules.yml"], check=True, timeout=PATIENCE)


Q = '{job="filao", instance="a", queue="claims"}'
READY = 'filao_queue_messages{job="filao", instance="a", queue="claims", state="ready"}'
AGE = 'filao_queue_oldest_age_seconds{job="filao", instance="a", queue="claims", state="ready"}'
DIED = 'filao_messages_died_total{job="filao", instance="a", queue="claims", reason="rejected"}'
WAL = 'filao_store_bytes{job="filao", instance="a", part="wal"}'
FIRES: dict[str, tuple[Mapping[str, str], ...]] = {
    "FilaoStoreUnreadable": (
        {'filao_store_up{job="filao", instance="a"}': "0x60"},
        {'filao_store_up{job="filao", instance="a"}': "1x60"},
    ),
    "FilaoNobodyReceives": (
        {READY: "5x60", f"filao_queue_receivers{Q}": "0x60", f"filao_queue_paused{Q}": "0x60"},
        {READY: "5x60", f"filao_queue_receivers{Q}": "0x60", f"filao_queue_paused{Q}": "1x60"},
        {READY: "5x60", f"filao_queue_receivers{Q}": "0x60", f"filao_messages_received_total{Q}": "0+1x60"},  # it polls
    ),
    "FilaoNothingReceived": (
        {f"filao_messages_sent_total{Q}": "0+1x60", f"filao_messages_received_total{Q}": "7x60"},
        {f"filao_messages_sent_total{Q}": "0+1x60", f"filao_messages_received_total{Q}": "0+1x60"},
    ),
    "FilaoOldestMessageTooOld": ({AGE: "901x60"}, {AGE: "899x60"}),
    "FilaoDeadLetters": ({DIED: "0+1x60"}, {DIED: "7x60"}),
    "FilaoLeasesLost": ({f"filao_leases_lost_total{Q}": "0+1x60"}, {f"filao_leases_lost_total{Q}": "7x60"}),
    "FilaoRedeliveries": (
        {
            f"filao_messages_nacked_total{Q}": "0+2x60",
            f"filao_leases_lost_total{Q}": "0+1x60",
            f"filao_messages_received_total{Q}": "0+10x60",
        },
        {
            f"filao_messages_nacked_total{Q}": "0+1x60",
            f"filao_leases_lost_total{Q}": "0x60",
            f"filao_messages_received_total{Q}": "0+10x60",
        },
    ),
    "FilaoWalLarge": ({WAL: "300000000x60"}, {WAL: "200000000x60"}),
    "FilaoQueuesHidden": (
        {'filao_queues_hidden{job="filao", instance="a"}': "3x60"},
        {'filao_queues_hidden{job="filao", instance="a"}': "0x60"},
    ),
}


def test_each_alert_fires_when_it_should_and_not_before(tmp_path) -> None:
    rules = resources.files("filao.prometheus").joinpath("rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(rules)
    assert {line.partition("alert: ")[2] for line in rules.splitlines() if "alert: " in line} == set(FIRES)
    for alert, (firing, *silent) in FIRES.items():
        assert fired(tmp_path, alert, firing), f"{alert} is silent"
        for series in silent:
            assert not fired(tmp_path, alert, series), f"{alert} fires: {series}"


def fired(folder: Path, alert: str, series: Mapping[str, str]) -> bool:
    """Return whether an alert fires at the end of an hour: promtool says that it expected none."""
    test = {
        "interval": "1m",
        "input_series": [{"series": one, "values": values} for one, values in series.items()],
        "alert_rule_test": [{"eval_time": "59m", "alertname": alert, "exp_alerts": []}],
    }
    path = folder / "test.yml"
    path.write_text(json.dumps({"rule_files": ["rules.yml"], "tests": [test]}))
    ran = subprocess.run(
        [program("promtool"), "test", "rules", path], capture_output=True, timeout=PATIENCE, check=False
    )
    said = (ran.stdout + ran.stderr).decode()
    assert ran.returncode == 0 or f'alertname="{alert}"' in said, said
    return ran.returncode != 0


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(list(map(str, arguments)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_a_real_prometheus_scrapes_a_store_that_changes(db, tmp_path) -> None:
    port = free_port()
    with running(*FILAO, "metrics", db, "--listen", "0") as server:
        assert server.stderr is not None
        url = server.stderr.readline().decode().split()[-1]
        target = urllib.parse.urlsplit(url).netloc
        jobs = [{"job_name": "filao", "static_configs": [{"targets": [target]}]}]
        config = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}, "scrape_configs": jobs}
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        with running(
            program("prometheus"),
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ):
            until_scraped(port, 'filao_queue_messages{queue="claims",state="ready"}', "1")
            with filao.sync.connect(db) as broker:
                broker.send_many("claims", range(4))
            until_scraped(port, 'filao_queue_messages{queue="claims",state="ready"}', "5")
            until_scraped(port, 'filao_messages_sent_total{queue="claims"}', "7")


APP = """
import filao

worker = filao.Worker("claims.db")

@worker.consumer("claims")
async def handle(message: filao.Message) -> None: ...
"""


def test_each_process_of_a_worker_serves_what_it_measures(db, tmp_path) -> None:
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    arguments = [*FILAO, "work", "app:worker", "--processes", "2", "--metrics", str(port)]
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + PATIENCE
            while (
                sum(handled(port + n) for n in range(2)) < 1
                or "filao_" not in page(port)
                or "filao_" not in page(port + 1)
            ):
                assert time.monotonic() < until
                time.sleep(0.1)
        finally:
            process.terminate()
        assert process.wait(PATIENCE) == 0


def page(port: int) -> str:
    """Return what is served there; empty while nothing is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


def handled(port: int) -> float:
    return samples(page(port)).get(("filao_handler_seconds_count", "acked", "claims"), 0.0)


def until_scraped(port: int, query: str, wanted: str) -> None:
    until, found = time.monotonic() + PATIENCE, ""
    while found != wanted:
        assert time.monotonic() < until, f"{query} is {found!r}, wanted {wanted!r}"
        found = scraped(port, query)
        time.sleep(0.1)


def scraped(port: int, query: str) -> str:
    """Return the present value; empty while there is none, or no Prometheus yet."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
    except (urllib.error.URLError, OSError):
        return ""
    return str(result[0]["value"][1]) if result else ""
