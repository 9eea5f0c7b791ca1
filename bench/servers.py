"""Servers of our own for the peers that need one: on free loopback ports, their data beside the other databases."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

STARTED_WITHIN = 90.0  # seconds


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def redis_server(folder: Path) -> Generator[str]:
    """Run Redis, which flushes every write before it answers; yield its port."""
    port = str(free_port())
    folder.mkdir()
    command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with _running([*command, "--appendonly", "yes", "--appendfsync", "always"], {}, int(port)):
        yield port


@contextmanager
def rabbitmq_server(folder: Path) -> Generator[str]:
    """Run RabbitMQ with a node, a cookie and a port mapper of its own; yield its port."""
    port, mapper, distribution = (str(free_port()) for _ in range(3))
    folder.mkdir()
    environment = {
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"bench{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": port,
        "RABBITMQ_DIST_PORT": distribution,
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
        "ERL_EPMD_PORT": mapper,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }
    server = shutil.which("rabbitmq-server", path=f"{os.environ.get('PATH', '')}:/usr/lib/rabbitmq/bin:/usr/sbin")
    # Debian's wrapper changes to a user of its own; the script behind it does not.
    behind = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["epmd", "-port", mapper, "-kill"], capture_output=True, check=False)
        stack.enter_context(_running([str(behind if behind.exists() else server)], environment, int(port)))
        yield port


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


def _wait_until_open(server: "subprocess.Popen[bytes]", port: int) -> None:
    until = time.monotonic() + STARTED_WITHIN
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{server.args!r} did not start")
        time.sleep(0.05)
