"""Servers of our own for tests and figures: on free loopback ports, their data in a folder of ours, ended with the
block.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

STARTED_WITHIN = 90.0  # seconds
_UNPRIVILEGED = "nobody"


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Postgres:
    """A PostgreSQL of our own."""

    def __init__(self, folder: Path, port: int) -> None:
        self._data = folder / "data"
        self._folder = folder
        self.port = port
        self.environment: dict[str, str] = {}
        """Further arguments of the server."""

    def url(self, database: str = "postgres", port: int | None = None) -> str:
        """Return the URL of one of its databases; `port` is that of something in between."""
        return f"postgresql://filao@127.0.0.1:{port or self.port}/{database}"

    def create(self, database: str) -> str:
        """Create a database and return its URL."""
        import psycopg  # so that what starts no PostgreSQL needs no driver

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"'.encode())
        return self.url(database)

    def initialise(self) -> None:
        """Make its data folder."""
        self._folder.mkdir(parents=True)
        if os.geteuid() == 0:  # which PostgreSQL refuses to be
            shutil.chown(self._folder, _UNPRIVILEGED)
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", "filao", "-E", "UTF8", "--no-sync")
        settings = f"""
            port = {self.port}
            listen_addresses = '127.0.0.1'
            unix_socket_directories = ''
            max_connections = 200
        """
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(settings)

    def follow(self, primary: "Postgres") -> None:
        """Make its data folder a copy of a running primary, so that it is a standby of that."""
        self._folder.mkdir(parents=True)
        if os.geteuid() == 0:
            shutil.chown(self._folder, _UNPRIVILEGED)
        about = ("-h", "127.0.0.1", "-p", str(primary.port), "-U", "filao")
        self._run("pg_basebackup", *about, "-D", str(self._data), "-R", "-X", "stream", "-c", "fast", "--no-sync")
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(f"\nport = {self.port}\n")

    def promote(self) -> None:
        """Make a standby the primary."""
        self._run("pg_ctl", "-D", str(self._data), "-w", "-t", "60", "promote")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._run("pg_ctl", "-D", str(self._data), "-l", str(self._folder / "log"), "-w", "-t", "60", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: "immediate" is a crash."""
        self._run("pg_ctl", "-D", str(self._data), "-m", mode, "-w", "-t", "60", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        found = shutil.which(program, path=_postgres_path())
        command = ["env", *(f"{name}={value}" for name, value in self.environment.items()), str(found), *arguments]
        if os.geteuid() == 0:
            command = ["setpriv", f"--reuid={_UNPRIVILEGED}", "--clear-groups", *command]
        log = self._folder / "commands.log"
        with log.open("ab") as output:  # not a pipe, which the server would inherit and keep open
            done = subprocess.run(command, stdout=output, stderr=output, cwd=self._folder, timeout=90, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {log.read_text(errors='replace')[-2000:]}")


def _postgres_path() -> str:
    """Return where its programs are looked for, first in FILAO_POSTGRES_BIN: the folder of another version, say."""
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    chosen = os.environ.get("FILAO_POSTGRES_BIN")
    return os.pathsep.join([*([chosen] if chosen else []), *map(str, reversed(newest)), os.environ.get("PATH", "")])


def has_postgres() -> bool:
    """Return whether PostgreSQL is installed here."""
    return shutil.which("initdb", path=_postgres_path()) is not None


@contextmanager
def postgres_server(folder: Path) -> Generator[Postgres]:
    """Run PostgreSQL as it comes, with its data in `folder`."""
    server = Postgres(folder, free_port())
    server.initialise()
    server.start()
    try:
        yield server
    finally:
        server.stop("immediate")


@contextmanager
def postgres_standby(folder: Path, primary: Postgres) -> Generator[Postgres]:
    """Run a standby that follows a primary, with its data in `folder`."""
    standby = Postgres(folder, free_port())
    standby.follow(primary)
    standby.start()
    try:
        yield standby
    finally:
        standby.stop("immediate")


def has_pgbouncer() -> bool:
    """Return whether PgBouncer is installed here."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is not None


@contextmanager
def pgbouncer(folder: Path, target: int, pool_mode: str = "transaction") -> Generator[int]:
    """Run PgBouncer, pooling transactions or as `pool_mode` says, before a PostgreSQL on port `target`; yield its own
    port.
    """
    port = free_port()
    folder.mkdir()
    (folder / "users").write_text('"filao" ""\n')
    (folder / "settings").write_text(f"""
        [databases]
        * = host=127.0.0.1 port={target}
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = trust
        auth_file = {folder / "users"}
        pool_mode = {pool_mode}
        default_pool_size = 3
    """)
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    command = [str(found), str(folder / "settings")]
    if os.geteuid() == 0:
        command[1:1] = ["-u", _UNPRIVILEGED]
    with _running(command, {}, port):
        yield port


@contextmanager
def redis_server(folder: Path) -> Generator[str]:
    """Run Redis, which flushes every write before it answers; yield its port."""
    port = str(free_port())
    folder.mkdir()
    command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with _running([*command, "--appendonly", "yes", "--appendfsync", "always"], {}, int(port)):
        yield port


class Rabbitmq:
    """A node of RabbitMQ of our own, with a name, a cookie and a port mapper of its own; or one of a cluster of
    them.
    """

    def __init__(self, folder: Path, *, mapper: int, cluster: Sequence[str] = (), name: str = "") -> None:
        self.port = free_port()
        self.name = name or f"node{self.port}@localhost"
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        own = folder / self.name
        own.mkdir(parents=True)
        settings = ["cluster_formation.peer_discovery_backend = classic_config"] if cluster else []
        settings += [f"cluster_formation.classic_config.nodes.{n} = {node}" for n, node in enumerate(cluster, start=1)]
        (own / "rabbitmq.conf").write_text("\n".join([*settings, "max_message_size = 1000000", ""]))
        self._environment = {
            "HOME": str(folder),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONFIG_FILE": str(own / "rabbitmq"),
            "RABBITMQ_MNESIA_BASE": str(own / "data"),
            "RABBITMQ_LOG_BASE": str(own / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(own / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(own / "environment"),
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def url(self, port: int | None = None, vhost: str = "") -> str:
        """Return its URL; `port` is that of something in between."""
        return f"amqp://guest:guest@127.0.0.1:{port or self.port}/{vhost}"

    def begin(self) -> None:
        """Start it, without waiting."""
        environment = os.environ | self._environment
        quiet = subprocess.DEVNULL
        self._server = subprocess.Popen(
            [_rabbitmq("rabbitmq-server")],
            env=environment,
            cwd=self._folder,  # where it leaves its core when it dies
            stdout=quiet,
            stderr=quiet,
            start_new_session=True,
        )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.begin()
        self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        assert self._server is not None
        _wait_until_open(self._server, self.port)
        self.command("await_startup")

    def crash(self) -> None:
        """End it by SIGKILL."""
        if self._server is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None
            while _is_open(self.port):  # what the script started ends a moment later
                time.sleep(0.01)

    def command(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on it."""
        command = [_rabbitmq("rabbitmqctl"), "-n", self.name, "-q", *arguments]
        environment = os.environ | self._environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
        if done.returncode:
            raise RuntimeError(f"{arguments}: {done.stdout}{done.stderr}")
        return done.stdout


def has_rabbitmq() -> bool:
    """Return whether RabbitMQ is installed here."""
    return (
        shutil.which("rabbitmq-server", path=f"{os.environ.get('PATH', '')}:/usr/lib/rabbitmq/bin:/usr/sbin")
        is not None
    )


def _rabbitmq(program: str) -> str:
    """Return where a program is. Debian's wrappers change to a user of their own; the scripts behind them do not."""
    behind = Path("/usr/lib/rabbitmq/bin") / program
    return str(behind if behind.exists() else shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin"))


@contextmanager
def rabbitmq_server(folder: Path) -> Generator[Rabbitmq]:
    """Run one RabbitMQ."""
    with rabbitmq_cluster(folder, 1) as (node,):
        yield node


@contextmanager
def rabbitmq_cluster(folder: Path, size: int) -> Generator[list[Rabbitmq]]:
    """Run a cluster of RabbitMQ nodes on this machine."""
    mapper = free_port()
    names = [f"node{number}-{mapper}@localhost" for number in range(size)]
    nodes = [Rabbitmq(folder, mapper=mapper, cluster=names if size > 1 else (), name=name) for name in names]
    try:
        for node in nodes:
            node.begin()
            time.sleep(0 if size == 1 else 1)  # all at once they write the same cookie
        for node in nodes:
            node.wait()
        yield nodes
    finally:
        for node in nodes:
            node.crash()
        subprocess.run(["epmd", "-port", str(mapper), "-kill"], capture_output=True, check=False)


@contextmanager
def _running(command: list[str], environment: dict[str, str], port: int) -> Generator[None]:
    server = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_until_open(server, port)
        yield
    finally:
        server.terminate()
        try:
            server.wait(STARTED_WITHIN)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_until_open(server: "subprocess.Popen[bytes]", port: int) -> None:
    until = time.monotonic() + STARTED_WITHIN
    while True:
        if _is_open(port):
            return
        if server.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{server.args!r} did not start")
        time.sleep(0.05)
