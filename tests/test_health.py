"""The health port, as probes and strangers meet it."""

import http.client
import socket
from collections.abc import Generator

import pytest

from filao.cli import pages
from filao.cli.health import health_check
from filao.cli.pages import CONNECTIONS_MAX

PATIENCE = 30.0


@pytest.fixture
def state() -> dict[str, object]:
    return {"ready": True, "healthy": False, "problems": ["it rests"]}


@pytest.fixture
def port(state) -> Generator[int]:
    with health_check("127.0.0.1", 0, lambda: state) as port:
        yield port


def ask(port: int, method: str = "GET", path: str = "/") -> tuple[int, bytes, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer
    finally:
        connection.close()


def test_it_tells_ready_and_healthy_with_the_reasons(port) -> None:
    assert ask(port)[:2] == (503, b'{"ready":true,"healthy":false,"problems":["it rests"]}')
    assert ask(port, path="/ready")[0] == 200
    assert ask(port, path="/ready?probe=1")[0] == 200


def test_head_is_answered_without_a_body(port) -> None:
    status, body, answer = ask(port, "HEAD", "/ready")
    assert (status, body) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 0


def test_other_methods_are_refused(port) -> None:
    assert ask(port, "POST")[0] == 405


def test_half_requests_take_nothing_from_a_probe(port) -> None:
    halves = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(4 * CONNECTIONS_MAX)]
    try:
        for half in halves:
            half.settimeout(PATIENCE)
            half.sendall(b"GET / HT")
        assert ask(port, path="/ready")[0] == 200
        assert _ends(halves[0])
    finally:
        for half in halves:
            half.close()


def test_a_request_that_does_not_end_is_ended(state, monkeypatch) -> None:
    monkeypatch.setattr(pages, "ANSWERS_WITHIN", 0.2)
    with (
        health_check("127.0.0.1", 0, lambda: state) as port,
        socket.create_connection(("127.0.0.1", port), PATIENCE) as half,
    ):
        half.sendall(b"GET / HT")
        assert _ends(half)


def test_a_request_that_is_too_long_is_ended(port) -> None:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as endless:
        endless.sendall(b"GET /" + b"x" * 20_000)
        assert _ends(endless)


def _ends(connection: socket.socket) -> bool:
    connection.settimeout(PATIENCE)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
