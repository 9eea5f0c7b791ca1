"""Bodies: what goes in comes out, what cannot is refused, and nothing is coerced."""

import math
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filao import ConfigurationError, MessageNotEncodable
from filao.codec import BYTES, JSON, codec_for, shown


@dataclass(frozen=True)
class Plain:
    claim_id: int
    amount: float = 0.0


class Struct(msgspec.Struct, frozen=True):
    claim_id: int


class Typed(TypedDict):
    claim_id: int


class Model(pydantic.BaseModel):
    claim_id: int


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # half a surrogate pair is no text that UTF-8 can hold
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)


@given(JSON_VALUES)
def test_every_json_value_comes_back_equal(value: Any) -> None:
    codec = codec_for(None)
    kind, content = codec.encode("q", value)
    assert kind == JSON
    assert codec.decode(kind, content) == value


@given(st.binary())
def test_bytes_pass_through_untouched(content: bytes) -> None:
    codec = codec_for(None)
    for body in (content, bytearray(content), memoryview(content)):
        assert codec.encode("q", body) == (BYTES, content)
    assert codec.decode(BYTES, content) == content


@pytest.mark.parametrize(
    "body",
    [Plain(7, 1.5), Struct(7), {"claim_id": 7}, Model(claim_id=7)],
    ids=["dataclass", "Struct", "TypedDict", "pydantic"],
)
def test_a_typed_body_comes_back_as_its_type(body: Any) -> None:
    codec = codec_for(Typed if isinstance(body, dict) else type(body))
    assert codec.decode(*codec.encode("q", body)) == body


@pytest.mark.parametrize("body", [Plain, Struct, Typed, Model])
def test_a_number_in_quotes_is_no_number(body: Any) -> None:
    with pytest.raises(MessageNotEncodable, match=body.__name__):
        codec_for(body).encode("q", {"claim_id": "7"})
    with pytest.raises(ValueError, match="claim_id"):
        codec_for(body).decode(JSON, b'{"claim_id": "7"}')


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"a": [v]}, lambda v: (v,), lambda v: Plain(1, v)])
def test_what_is_no_number_is_refused_wherever_it_hides(value: float, wrap: Any) -> None:
    with pytest.raises(MessageNotEncodable, match=r"nan|inf"):
        codec_for(None).encode("q", wrap(value))


def test_null_in_a_body_is_fine() -> None:
    assert codec_for(None).encode("q", {"a": None, "b": "null"}) == (JSON, b'{"a":null,"b":"null"}')


def test_a_pydantic_model_in_a_plain_body_is_written_by_pydantic() -> None:
    assert codec_for(None).encode("q", {"claim": Model(claim_id=7)}) == (JSON, b'{"claim":{"claim_id":7}}')


def test_a_type_that_nothing_can_decode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be the type"):
        codec_for(lambda: 1)


def test_an_error_text_survives_a_value_that_cannot_be_shown() -> None:
    class Nasty:
        __qualname__ = "Nasty"

        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert "RuntimeError" in shown(Nasty())
    assert len(shown("x" * 1000)) < 100
