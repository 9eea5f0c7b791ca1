"""`filao.contrib.django`, in a project of its own, in processes of its own: Django is configured once in each."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import filao.sync

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0  # seconds, for a loaded machine
SETTINGS = """
from pathlib import Path
from urllib.parse import urlsplit

BASE_DIR = Path(__file__).parent
SECRET_KEY = "tests"
USE_TZ = True
INSTALLED_APPS = ["filao.contrib.django", "shop"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": BASE_DIR / "shop.sqlite3",
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},
        "TEST": {"NAME": BASE_DIR / "test.sqlite3"},
    }
}
FILAO = {"QUEUES": ["shop.queues.documents"], "WORKER": "shop.queues:worker"}
"""
MODELS = """
from django.db import models

class Policy(models.Model):
    holder = models.CharField(max_length=50)
"""
QUEUES = """
import filao
import filao.sync
from django.db import connection
from filao.contrib.django import worker

documents = filao.Queue("documents")
worker = worker()

@worker.consumer(documents)
def print_policy(message: filao.sync.Message) -> None:
    from shop.models import Policy
    Policy.objects.filter(id=message["policy"]).update(holder="printed")
    with open("printed", "a") as out:
        out.write(f"{message['policy']}\\n")
"""
PRELUDE = """
import os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
sys.path.insert(0, os.getcwd())
import django
django.setup()
import filao
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.db import connection, transaction
from filao.contrib.django import broker
from shop.models import Policy

def waiting():
    return broker().stats("documents").ready

def subscribe():
    policy = Policy.objects.create(holder="Ana")
    return broker().send_to_queue("documents", {"policy": policy.id})
"""


@pytest.fixture
def project(tmp_path: Path, migrated: Path) -> Path:
    shutil.copytree(migrated, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*-filao"))
    return tmp_path


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("project")
    (tmp_path / "settings.py").write_text(SETTINGS)
    (tmp_path / "shop" / "migrations").mkdir(parents=True)
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "migrations" / "__init__.py").touch()
    (tmp_path / "shop" / "models.py").write_text(MODELS)
    (tmp_path / "shop" / "queues.py").write_text(QUEUES)
    (tmp_path / "manage.py").write_text(
        "import multiprocessing, os, sys\nos.environ.setdefault('DJANGO_SETTINGS_MODULE', 'settings')\n"
        "from django.core.management import execute_from_command_line\n"
        "if __name__ == '__main__':\n    multiprocessing.set_start_method('fork')  # as Django needs for --parallel\n"
        "    execute_from_command_line(sys.argv)\n"
    )
    manage(tmp_path, "makemigrations", "shop")
    manage(tmp_path, "migrate")
    return tmp_path


def manage(project: Path, *arguments: str) -> str:
    return _run(project, [sys.executable, "manage.py", *arguments])


def program(project: Path, code: str) -> str:
    return _run(project, [sys.executable, "-c", PRELUDE + code])


def elsewhere(project: Path, url: str = "queue.db") -> None:
    """Let the queue lie in a database of its own."""
    with (project / "settings.py").open("a") as settings:
        settings.write(f'\nFILAO["URL"] = BASE_DIR / {url!r}\n')
    manage(project, "migrate")


def _run(project: Path, command: list[str]) -> str:
    ended = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


def test_a_send_inside_atomic_is_part_of_the_transaction_of_the_queues_own_database(project) -> None:
    program(
        project,
        """
class Undone(Exception): ...
try:
    with transaction.atomic():
        subscribe()
        raise Undone
except Undone:
    pass
assert (Policy.objects.count(), waiting()) == (0, 0)
with transaction.atomic():
    receipt = subscribe()
    assert waiting() == 0
assert (Policy.objects.count(), waiting()) == (1, 1)
assert broker().receive_from_queue("documents").id == receipt.id
""",
    )


def test_a_transaction_of_any_alias_of_the_queues_own_database_counts(project) -> None:
    with (project / "settings.py").open("a") as settings:
        settings.write('\nDATABASES["reports"] = DATABASES["default"]\n')
    program(
        project,
        """
with transaction.atomic(using="reports"):
    broker().send_to_queue("documents", {"policy": 7})
    transaction.set_rollback(True, using="reports")
assert waiting() == 0
with transaction.atomic(using="reports"):
    broker().send_to_queue("documents", {"policy": 7})
    assert waiting() == 0
assert waiting() == 1
""",
    )


def test_a_send_outside_any_transaction_is_sent_at_once(project) -> None:
    program(project, "subscribe()\nassert waiting() == 1\nassert len(broker().send_many('documents', [1, 2])) == 2\n")


def test_where_the_queue_lies_elsewhere_a_send_waits_for_the_commit(project) -> None:
    elsewhere(project)
    program(
        project,
        """
class Undone(Exception): ...
try:
    with transaction.atomic():
        subscribe()
        raise Undone
except Undone:
    pass
assert (Policy.objects.count(), waiting()) == (0, 0)
body = {"policy": 7}
with transaction.atomic():
    receipt = broker().send_to_queue("documents", body)
    broker().send_many("documents", [1, 2])
    body["policy"] = 8  # it was sent as it was
    assert waiting() == 0
assert waiting() == 3
message = broker().receive_from_queue("documents")
assert (message.id, message.body) == (receipt.id, {"policy": 7})
""",
    )


def test_what_cannot_be_sent_after_the_commit_is_refused_before_it(project) -> None:
    elsewhere(project)
    program(
        project,
        """
import filao
for queue, body, error in [("document", 1, filao.QueueNotFound), ("documents", object(), filao.MessageNotEncodable),
                           ("documents", "x" * 300_000, filao.MessageTooLarge)]:
    try:
        with transaction.atomic():
            broker().send_to_queue(queue, body)
    except error:
        continue
    raise AssertionError(queue)
assert waiting() == 0
""",
    )


def test_a_queue_that_another_thread_has_not_seen_yet_can_be_sent_to(project) -> None:
    elsewhere(project)
    code = """
from tests.support.instructions import stopped_at
broker().send_to_queue("documents", 0)

def send():
    with transaction.atomic():
        broker().send_to_queue("documents", 1)

def learn():  # what another thread read a moment before the queue was declared
    met.append(at)
    broker()._rules = {}

at, met = 0, [0]
while met[-1] == at:
    at += 1
    stopped_at(send, at, learn)
assert at > 100
assert waiting() == at + 1
"""
    program(project, f"sys.path.append({str(ROOT)!r})\n{code}")


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_a_send_in_a_transaction_that_can_only_be_undone_is_refused_as_django_refuses_a_query(project, place) -> None:
    if place == "elsewhere":
        elsewhere(project)
    program(
        project,
        """
for send in [lambda: broker().send_to_queue("documents", 1), lambda: broker().send_many("documents", [1, 2])]:
    with transaction.atomic():
        try:
            with transaction.atomic(savepoint=False):
                Policy.objects.create(holder="Ana")
                raise ValueError
        except ValueError:
            pass
        try:
            receipt = send()
        except filao.EngineError as error:
            assert "TransactionManagementError" in str(error) and "Nothing was sent" in str(error), error
        else:
            raise AssertionError(receipt)
with transaction.atomic():
    subscribe()
assert (Policy.objects.count(), waiting()) == (1, 1)
""",
    )


def test_a_page_that_uses_no_queue_is_answered_while_the_queue_is_away(project) -> None:
    with (project / "settings.py").open("a") as settings:
        settings.write('\nFILAO["URL"] = "postgresql://nobody@127.0.0.1:1/none"\nROOT_URLCONF = "web"\n')
    (project / "web.py").write_text(
        "import django.http, django.urls\n"
        "urlpatterns = [django.urls.path('', lambda request: django.http.HttpResponse(b'done'))]\n"
    )
    program(
        project,
        """
from django.test import Client
for url in ("postgresql://nobody@127.0.0.1:1/none", None):
    settings.FILAO["URL"] = url
    if url is None:
        connection.settings_dict["NAME"] = ":memory:"  # as in tests of programs
    assert Client(SERVER_NAME="localhost").get("/").content == b"done"
    try:
        broker()
    except (filao.FilaoError, ImproperlyConfigured):
        continue
    raise AssertionError(url)
""",
    )


def test_the_worker_of_the_settings_runs_in_several_processes_wherever_it_is_started(project, tmp_path_factory) -> None:
    here = tmp_path_factory.mktemp("elsewhere")
    with (project / "shop" / "queues.py").open("a") as queues:
        queues.write("\nimport sys\nif sys.flags.optimize != 1: raise ImportError('without -O')\n")
    with filao.sync.connect(project / "shop.sqlite3") as broker:
        broker.send_many("documents", [{"policy": number} for number in range(5)])
    command = [sys.executable, "-O", str(project / "manage.py"), "filao_worker", "--processes", "2"]
    working = subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True)
    try:
        with filao.sync.connect(project / "shop.sqlite3") as broker:
            broker.declare(filao.Queue("ended"))
            for _ in range(int(PATIENCE * 10)):
                stats = broker.stats("documents")
                if stats.ready + stats.leased == 0:
                    break
                broker.receive_from_queue("ended", wait=0.1)  # nothing comes
        working.send_signal(signal.SIGTERM)
        _, said = working.communicate(timeout=PATIENCE)
    finally:
        working.kill()
    assert working.returncode == 0, said
    assert sorted((here / "printed").read_text().split()) == ["0", "1", "2", "3", "4"]


def test_connections_are_closed_between_messages(project) -> None:
    program(
        project,
        """
import asyncio
from django.db.backends.signals import connection_created
from shop.queues import worker

opened = []
connection_created.connect(lambda **_: opened.append(1), weak=False)
subscribe()
subscribe()
opened.clear()
assert [handled.how for handled in asyncio.run(worker.drain())] == ["acked", "acked"]
assert len(opened) == 2, opened
assert Policy.objects.filter(holder="printed").count() == 2
""",
    )


def test_the_checks_know_what_is_wrong(project) -> None:
    assert "no issues" in manage(project, "check", "--database", "default")
    settings = (project / "settings.py").read_text()
    for line, told in [
        ('DATABASES["default"]["OPTIONS"] = {}', "filao.W001"),
        ('FILAO["URI"] = "queue.db"', "filao.E001"),
        ('FILAO["URL"] = "https://queue"', "filao.E002"),
        ('DATABASES["default"]["NAME"] = ":memory:"', "filao.E002"),
        ('FILAO["DATABASE"] = "replica"', "filao.E002"),
        ('FILAO["QUEUES"] = ["shop.queues.claims"]', "filao.E003"),
        ('FILAO["QUEUES"], FILAO["WORKER"] = "shop.queues.documents", FILAO["QUEUES"][0]', "and no Worker"),
    ]:
        (project / "settings.py").write_text(f"{settings}\n{line}\n")
        command = [sys.executable, "manage.py", "check", "--database", "default"]
        ended = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert told in ended.stderr, ended.stderr


def test_a_worker_that_the_settings_do_not_name_is_told_in_one_line(project) -> None:
    with (project / "settings.py").open("a") as settings:
        settings.write('\ndel FILAO["WORKER"]\n')
    command = [sys.executable, "manage.py", "filao_worker"]
    ended = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[0].startswith('CommandError: FILAO["WORKER"] names no worker')


@pytest.mark.parametrize("options", [(), ("--parallel", "2")])
def test_djangos_tests_have_a_queue_of_their_own_work_on_it_and_undo_their_sends(project, options) -> None:
    (project / "shop" / "tests.py").write_text(
        """
import asyncio
from django.test import TestCase, TransactionTestCase
from filao.contrib.django import broker
from shop.queues import worker  # before the test's database has its name

class Works(TransactionTestCase):
    def test_it(self):
        broker().send_to_queue("documents", {"policy": 7})
        self.assertEqual([handled.how for handled in asyncio.run(worker.drain())], ["acked"])

class Sends(TestCase):
    def test_first(self):
        broker().send_to_queue("documents", 1)
        self.assertEqual(broker().stats("documents").ready, 0)  # the test's transaction is open

    def test_second(self):
        self.assertEqual(broker().stats("documents").ready, 0)

class Others(Sends):  # in another process, which has a copy of the database, if there are two
    pass
"""
    )
    with filao.sync.connect(project / "shop.sqlite3") as broker:
        broker.send_to_queue("documents", {"policy": 1})
        assert "OK" in manage(project, "test", "shop", *options)
        assert broker.stats("documents").ready == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_view_under_gunicorn_with_preload_and_threads_sends(project) -> None:
    pytest.importorskip("gunicorn")
    (project / "web.py").write_text(
        PRELUDE
        + """
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

def subscribed(request):
    with transaction.atomic():
        subscribe()
    return HttpResponse(b"done")

urlpatterns = [path("", subscribed)]
application = get_wsgi_application()
broker()  # before the fork
"""
    )
    with (project / "settings.py").open("a") as settings:
        settings.write('\nROOT_URLCONF = "web"\nALLOWED_HOSTS = ["*"]\n')
    serving = subprocess.Popen(
        [
            *(sys.executable, "-m", "gunicorn", "web:application", "--preload", "--worker-class", "gthread"),
            *("--workers", "2", "--threads", "2", "--bind", "unix:web.sock", "--no-control-socket"),
        ],
        cwd=project,
        stderr=subprocess.PIPE,
        text=True,
    )
    import httpx

    try:
        transport = httpx.HTTPTransport(uds=str(project / "web.sock"), retries=0)
        with httpx.Client(transport=transport, base_url="http://web", timeout=PATIENCE) as client:
            for line in serving.stderr or ():
                if "Booting worker" in line:
                    break
            for _ in range(4):
                assert client.get("/").text == "done"
    finally:
        serving.terminate()
        _, said = serving.communicate(timeout=PATIENCE)
    assert serving.returncode == 0, said
    with filao.sync.connect(project / "shop.sqlite3") as broker:
        assert broker.stats("documents").ready == 4


def on_postgresql(project: Path, url: str) -> None:
    parts = urlsplit(url)
    with (project / "settings.py").open("a") as settings:
        settings.write(
            f'\nDATABASES["default"] = {{"ENGINE": "django.db.backends.postgresql", "NAME": {parts.path[1:]!r}, '
            f'"USER": {parts.username!r}, "HOST": {parts.hostname!r}, "PORT": {str(parts.port)!r}}}\n'
        )


def test_djangos_tests_can_copy_and_drop_their_databases_on_postgresql(project, postgres) -> None:
    on_postgresql(project, postgres.create("django_tests"))
    (project / "shop" / "queues.py").write_text(
        QUEUES
        + """
@worker.consumer(filao.Queue("letters"))
async def print_letter(message: filao.Message) -> None:
    from shop.models import Policy
    await Policy.objects.acount()
"""
    )
    program(
        project,
        """
import asyncio
from django.test.utils import setup_databases, teardown_databases
from shop.queues import worker
settings.DATABASES["default"]["CONN_MAX_AGE"] = None  # so that nothing but us closes its connections
databases = setup_databases(verbosity=1, interactive=False, parallel=2)  # a second one is copied from the first
broker().declare(filao.Queue("letters"))
broker().send_to_queue("letters", 7)
subscribe()
assert sorted(handled.how for handled in asyncio.run(worker.drain())) == ["acked", "acked"]
assert waiting() == 0
teardown_databases(databases, verbosity=1, parallel=2)
""",
    )


def test_on_postgresql_a_send_joins_the_transaction_too_or_says_why_not(project, postgres) -> None:
    on_postgresql(project, postgres.create("django"))
    manage(project, "migrate")
    program(
        project,
        """
class Undone(Exception): ...
try:
    with transaction.atomic():
        subscribe()
        raise Undone
except Undone:
    pass
assert (Policy.objects.count(), waiting()) == (0, 0)
with transaction.atomic():
    receipt = subscribe()
    assert waiting() == 0
assert broker().receive_from_queue("documents").id == receipt.id

import filao
from django.db import IntegrityError
with transaction.atomic():
    try:
        Policy.objects.create(id=1000)
        Policy.objects.create(id=1000)
    except IntegrityError:
        pass
    try:
        receipt = broker().send_to_queue("documents", 1)
    except filao.EngineError as error:
        assert "TransactionManagementError" in str(error) and "Nothing was sent" in str(error), error
    else:
        raise AssertionError(receipt)
    transaction.set_rollback(True)
with transaction.atomic():
    connection.cursor().execute("SET TRANSACTION READ ONLY")
    try:
        broker().send_to_queue("documents", 1)
    except filao.ConfigurationError as error:
        assert "is read-only" in str(error), error
    transaction.set_rollback(True)
assert waiting() == 0
""",
    )
