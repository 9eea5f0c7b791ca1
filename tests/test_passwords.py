"""No text shows a password: no exception, log, `repr`, finding, list of processes or of connections."""

import asyncio
import logging
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

import filao
import filao.sync
from filao.urls import shown_url

pytestmark = pytest.mark.anyio

FILAO = [sys.executable, "-m", "filao"]
PATIENCE = 30.0  # seconds after which a program that hangs is killed
SECRETS = ("geheim", "wort")
AWKWARD = [*"/@%:?#[] '\"\\&=+é℀\u202e", "%zz", "//", "@h:", "://", "\udcff"]
PASSWORDS = [f"geheim{between}wort" for between in AWKWARD]
SCHEMES = ["postgresql", "amqp", "amqps", "POSTGRESQL"]
UNKNOWN = ["postgresql+psycopg", "amqp+ssl", "sqlite", "x"]
FORMS = {
    "as it is": "{scheme}://u:{password}@127.0.0.1:1/db",
    "escaped": "{scheme}://u:{escaped}@127.0.0.1:1/db",
    "no user": "{scheme}://:{password}@127.0.0.1:1/db",
    "a port that is none": "{scheme}://u:{password}@127.0.0.1:port/db",
    "no host": "{scheme}://u:{password}@/db",
    "nothing behind it": "{scheme}://u:{password}",
    "two hosts": "{scheme}://u:{password}@127.0.0.1:1,127.0.0.1:2/db",
    "a setting": "{scheme}://127.0.0.1:1/db?password={password}",
    "a setting that is none": "{scheme}://u:{password}@127.0.0.1:1/db?colour=red",
    "no scheme": "u:{password}@127.0.0.1:1/db",
    "half a scheme": "{scheme}:/u:{password}@127.0.0.1:1/db",
    "settings": "host=127.0.0.1 port=1 password={password}",
    "with a NUL": "{scheme}://u:{password}\0@127.0.0.1:1/db",
}


def check(text: str, url: str) -> None:
    for secret in SECRETS:
        assert secret not in text, (url, text)


async def told_about(url: str) -> str:
    """Return all that is said when a URL is used, in vain."""
    try:
        broker = filao.connect(url)
        said = repr(broker)
        async with broker:
            pass
    except filao.FilaoError as error:
        said = repr(error) + "".join(traceback.format_exception(error))
        cause: BaseException | None = error
        while cause is not None:  # what a log that follows each context would show
            said += repr(cause) + str(cause)
            cause = cause.__cause__ or cause.__context__
        return said
    raise AssertionError(f"{url} was opened: {said}")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("scheme", [*SCHEMES, *UNKNOWN])
async def test_no_error_and_no_log_shows_a_password(scheme, form, caplog, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    for password in PASSWORDS:
        if form.endswith("{password}") and "@" in password:
            continue  # nobody can tell that what follows is no host
        url = form.format(scheme=scheme, password=password, escaped=quote(password, safe="", errors="surrogateescape"))
        check(await told_about(url), url)
        check(shown_url(url), url)
        check("\n".join(map(logging.Formatter().format, caplog.records)), url)
        caplog.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["claims.db", "/tmp/a:b@c.db", "./u:x@h.db", "sqlite:////tmp/a:b@c.db", "x=1.db"])
def test_the_path_of_a_file_is_shown_as_it_is(file) -> None:
    assert shown_url(file) == file


@pytest.mark.parametrize("password", ["geheim", "geheim/wort", "geheim%zzwort", "geheim@wort"])
@pytest.mark.parametrize("scheme", ["postgresql", "amqp", "postgresql+psycopg"])
def test_no_command_shows_a_password(scheme, password, tmp_path) -> None:
    url = f"{scheme}://u:{password}@127.0.0.1:1/db"
    file = tmp_path / "claims.db"
    with filao.sync.connect(file) as broker:
        broker.declare(filao.Queue("claims"))
    for arguments in (
        ["stats", url],
        [url, "stats"],
        ["stats", "claims", url],
        ["stats", file, url],
        ["move", url, url, url],
        ["move", file, url],
        ["peek", url, "claims", "--limit", url],
        ["declare", url, "claims", f"--{url}"],
    ):
        done = subprocess.run(
            [*FILAO, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=tmp_path
        )
        assert done.returncode in (1, 2, 3, 4), done.stderr
        check(done.stdout + done.stderr, " ".join(map(str, arguments)))
        assert "Traceback" not in done.stderr


def test_hints_do_not_show_the_password_of_the_environment(tmp_path) -> None:
    environment = os.environ | {"FILAO_URL": "postgresql://u:geheim@127.0.0.1:1/db"}
    for arguments in (["stats"], ["stats", "a/b"], ["peek"], ["stats", "--geheim"]):
        done = subprocess.run(
            [*FILAO, *arguments[:2]],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            cwd=tmp_path,
            env=environment,
        )
        check(done.stdout + done.stderr.replace("--geheim", ""), str(arguments))


def test_processes_that_we_start_do_not_show_the_password_in_their_arguments(tmp_path) -> None:
    (tmp_path / "app.py").write_text(
        "import filao\nworker = filao.Worker('postgresql://u:geheim@127.0.0.1:1/db')\n"
        "@worker.consumer('claims')\nasync def handle(message): ...\n"
    )
    command = [*FILAO, "work", "app:worker", "--processes", "2"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as supervisor:
        try:
            until = time.monotonic() + PATIENCE
            children: list[str] = []
            while not children and time.monotonic() < until:
                children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
            assert children
            for process in [str(supervisor.pid), *children]:
                check(Path(f"/proc/{process}/cmdline").read_text(), process)
        finally:
            supervisor.terminate()


async def test_postgresql_lists_our_connections_without_the_password(postgres) -> None:
    url = postgres.url().replace("filao@", "filao:geheim@")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("passwords"))
        await broker.send_to_queue("passwords", 1)
        waiting = asyncio.ensure_future(broker.receive_many("passwords", 10, wait=0.2))
        with psycopg.connect(postgres.url()) as connection:
            check(str(connection.execute("SELECT * FROM pg_stat_activity").fetchall()), url)
        await waiting
        check(str(await broker.doctor()) + repr(broker), url)


async def test_rabbitmq_lists_our_connections_without_the_password(rabbitmq) -> None:
    rabbitmq.command("add_user", "secretive", "geheim")
    rabbitmq.command("set_permissions", "secretive", ".*", ".*", ".*")
    url = rabbitmq.url().replace("guest:guest", "secretive:geheim")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("passwords", backoff=filao.Backoff(first=0)))
        await broker.receive_from_queue("passwords", wait=0)
        shown = rabbitmq.command("list_connections", "name", "user", "client_properties")
        assert "secretive" in shown
        check(shown, url)
        check(str(await broker.doctor()) + repr(broker), url)
