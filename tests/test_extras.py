"""Every way in to what an extra brings says, where its libraries are not installed, what to install."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.shell import run

PATIENCE = 240.0  # seconds for one process that tries them all, on a machine that does much else
DASHBOARD = ("filao[dashboard]", "starlette", "jinja2")  # what mounts it brings the server that it likes
DJANGO = ("django", "django")
OPENTELEMETRY = ("filao[opentelemetry]", "opentelemetry.trace")
POSTGRESQL = ("filao[postgresql]", "psycopg")
PROMETHEUS = ("filao[prometheus]", "prometheus_client")
RABBITMQ = ("filao[rabbitmq]", "aio_pika")
WEB = ("filao[web]", "starlette", "uvicorn", "websockets")
WAYS = {  # what to install for each, and the libraries that it brings
    "import filao.dashboard": DASHBOARD,
    "import filao.dashboard.views": DASHBOARD,
    "import filao.opentelemetry": OPENTELEMETRY,
    "import filao.prometheus.store": PROMETHEUS,
    "import filao.prometheus.worker": PROMETHEUS,
    "import filao.contrib.django": DJANGO,
    "import filao.contrib.django.apps": DJANGO,
    "import filao.testing": ("pytest", "pytest"),
    "import filao.sandbox.web.server": WEB,
    "import filao.engines.postgresql": POSTGRESQL,
    "filao.connect('postgresql://user:secret@host/claims')": POSTGRESQL,
    "filao.connect('amqp://user:secret@host/')": RABBITMQ,
    "filao.sync.connect('amqps://user:secret@host/')": RABBITMQ,
    "command('dashboard', 'claims.db')": (*DASHBOARD, "uvicorn"),
    "command('dashboard', 'postgresql://user:secret@host/claims')": POSTGRESQL,
    "command('sandbox', '--no-browser', '--port', '0')": WEB,
    "command('metrics', 'claims.db')": PROMETHEUS,
    "command('stats', 'amqp://user:secret@host/')": RABBITMQ,
    "command('work', 'app:worker', '--metrics', '0')": PROMETHEUS,
    "command('work', 'app:worker', '--metrics', '0', '--processes', '2')": PROMETHEUS,
}
TRY_EACH = """
import json, os, signal, sys
import filao, filao.sync
from filao.cli import commands

def command(*arguments):
    commands.main(arguments, standalone_mode=False)

def said(way, absent):
    sys.modules[absent] = None
    try:
        exec(way)
    except (filao.FilaoError, ImportError) as error:
        return [isinstance(error, kind) for kind in (filao.ConfigurationError, ImportError)], str(error)

for one in json.load(sys.stdin):
    if child := os.fork():  # each in a process that has imported nothing else
        os.waitpid(child, 0)
    else:
        signal.alarm(60)
        print(json.dumps([*one, said(*one)]), flush=True)
        os._exit(0)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[tuple[str, str], tuple[list[bool], str] | None]:
    """Return what each way in says where one of its libraries is missing."""
    folder: Path = tmp_path_factory.mktemp("extras")
    (folder / "claims.db").touch()
    (folder / "app.py").write_text("import filao; worker = filao.Worker('claims.db')")
    cases = [(way, library) for way, (_, *libraries) in WAYS.items() for library in libraries]
    ran = subprocess.run(
        [sys.executable, "-c", TRY_EACH],
        input=json.dumps(cases).encode(),
        stdout=subprocess.PIPE,
        cwd=folder,
        timeout=PATIENCE,
        check=True,
    )
    return {(way, library): said for way, library, said in map(json.loads, ran.stdout.splitlines())}


@pytest.mark.parametrize("way", WAYS)
def test_what_needs_an_extra_says_which(told, way) -> None:
    install, *libraries = WAYS[way]
    for library in libraries:
        (is_configuration, is_import), text = told[way, library]
        assert is_configuration, "what catches Filao's errors catches it"
        assert is_import, "and so does what can do without"
        assert f": pip install '{install}' (" in text
        assert library in text
        assert "secret" not in text


def test_a_module_of_the_user_that_is_missing_is_not_taken_for_an_extra(tmp_path) -> None:
    (tmp_path / "app.py").write_text("import filao.dashboard, policies")
    ran = run("work", "app:worker", cwd=tmp_path)
    assert ran.code == 2
    assert "No module named 'policies'" in ran.err
    assert "pip install" not in ran.err


def test_a_library_of_an_extra_that_fails_is_told_with_its_error(tmp_path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('no pq wrapper available')")
    ran = run("stats", "postgresql://host/claims", cwd=tmp_path)
    assert ran.code == 3
    assert ran.err == (
        "filao: a postgresql:// URL needs what cannot be imported here: pip install 'filao[postgresql]' "
        "(no pq wrapper available)\n"
    )


def test_alert_rules_are_printed_without_the_extra(tmp_path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError")
    ran = run("metrics", "--rules", "--grafana", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert b"filao_messages_died" in ran.out
