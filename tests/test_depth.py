"""A body nested too deeply is refused when it is sent; one that is stored all the same breaks no view of the others."""

import json
import sqlite3
from contextlib import closing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import filao
from filao.codec import DEPTH_MAX, is_too_deep
from tests.support.shell import run

pytestmark = pytest.mark.anyio

JSON_VALUES = st.recursive(
    st.none() | st.text('[]{}"\\', max_size=5), lambda inner: st.lists(inner) | st.dictionaries(st.text('[{"\\'), inner)
)


def nested(depth: int) -> Any:
    body: Any = 1
    for level in range(depth):
        body = [body] if level % 2 else {"]": body}
    return body


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


async def test_a_body_is_sent_up_to_the_depth_that_all_readers_bear(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", nested(DEPTH_MAX))
        for body in (nested(DEPTH_MAX + 1), nested(400), msgspec.Raw(deep(100_000))):
            with pytest.raises(filao.MessageNotEncodable, match=r"claims.*200 deep.*Nothing was sent"):
                await broker.send_to_queue("claims", body)
            with pytest.raises(filao.MessageNotEncodable):
                await broker.send_many("claims", [1, body])
        await broker.send_to_queue("claims", deep(100_000))  # as bytes nobody reads it
        assert [message.body for message in await broker.peek("claims")] == [nested(DEPTH_MAX), deep(100_000)]


async def test_a_stored_body_that_is_too_deep_breaks_no_view(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        for number in range(4):
            await broker.send_to_queue("claims", number, headers={"a": "b"})
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE filao_message SET content = ? WHERE id = 1", (deep(100_000),))
        connection.execute("UPDATE filao_message SET content = ? WHERE id = 2", (deep(400),))
        connection.execute("UPDATE filao_message SET headers = '[' WHERE id = 3")
    shown = run("peek", path, "claims")
    assert shown.code == 0, shown.err
    assert [line["bytes"] for line in shown.lines] == [True, True, False, False]
    assert shown.lines[3]["body"] == 3
    async with filao.connect(path) as broker:
        assert [message.body for message in await broker.peek("claims")] == [deep(100_000), deep(400), 2, 3]


@given(JSON_VALUES, st.integers(DEPTH_MAX - 3, DEPTH_MAX + 3))
def test_the_depth_is_that_of_the_brackets_outside_texts(value, depth) -> None:
    wrapped = ["[" * 300, value]
    around, behind = "[" * (depth - 2), "]" * (depth - 2)
    content = f"{around}{json.dumps(wrapped)}{behind}".encode()
    assert is_too_deep(content) == (depth - 2 + _depth(wrapped) > DEPTH_MAX)


def _depth(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(_depth, value if isinstance(value, list) else value.values()), default=0)
