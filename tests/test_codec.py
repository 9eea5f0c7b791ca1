"""Bodies: what goes in comes out, what cannot is refused, and nothing is coerced."""

import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filao import ConfigurationError, MessageNotEncodable, Queue
from filao.codec import BYTES, JSON, codec_for, shown
from filao.message import error_text
from filao.overview import error_kind


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


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Dated:
    on: date
    amount: Decimal


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


COERCED: list[Any] = [
    Decimal("1.5"),
    {1, 2},
    (1, 2),
    datetime(2026, 1, 1),  # noqa: DTZ001  # naive on purpose
    datetime(2026, 1, 1, tzinfo=UTC),
    date(2026, 1, 1),
    timedelta(1),
    UUID(int=7),
    Colour.RED,
    {1: 2},
    {1: "a", "1": "b"},
    {None: 1},
    {"photo": b"bytes"},
]


@pytest.mark.parametrize("value", COERCED, ids=repr)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"a": [v]}], ids=["itself", "inside"])
def test_what_would_come_back_as_something_else_is_refused(value: Any, wrap: Any) -> None:
    for body in (None, dict, list):
        with pytest.raises(MessageNotEncodable, match=r"come back as|Expected|cannot be written"):
            codec_for(body).encode("q", wrap(value))


@dataclass
class Open:
    claim_id: int
    extra: Any = None


@pytest.mark.parametrize("value", COERCED, ids=repr)
def test_what_a_type_leaves_open_comes_back_as_it_was_or_is_refused(value: Any) -> None:
    inside = Open(7, {"a": [value]})
    for body, sent in ((Open, inside), (list[Open], [inside]), (None, {"claim": inside}), (Any, value)):
        with pytest.raises(MessageNotEncodable, match=r"come back as|cannot be written"):
            codec_for(body).encode("q", sent)


def test_what_a_type_leaves_open_may_be_what_json_holds() -> None:
    codec = codec_for(Open)
    possible: list[Any] = [None, 1.5, "text", [{"a": [True, None]}], {"b": {}}]
    for extra in possible:
        assert codec.decode(*codec.encode("q", Open(7, extra))) == Open(7, extra)
    with pytest.raises(MessageNotEncodable, match=r"the Open at \.extra would come back as a dict"):
        codec.encode("q", Open(7, Open(8)))


def test_the_place_of_what_is_refused_is_told() -> None:
    with pytest.raises(MessageNotEncodable, match=r"the Decimal at \['lines'\]\[1\]\['amount'\]"):
        codec_for(None).encode("q", {"lines": [{}, {"amount": Decimal(1)}]})


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (Decimal, Decimal("1.5")),
        (set[int], {1, 2}),
        (tuple[int, int], (1, 2)),
        (dict[int, int], {1: 2}),
        (datetime, datetime(2026, 1, 1)),  # noqa: DTZ001
        (Dated, Dated(date(2026, 1, 1), Decimal(1))),
        (dict[str, Dated], {"a": Dated(date(2026, 1, 1), Decimal(1))}),
    ],
    ids=repr,
)
def test_what_the_queues_type_restores_is_sent(body: Any, value: Any) -> None:
    codec = codec_for(body)
    assert codec.decode(*codec.encode("q", value)) == value


def test_a_record_in_a_plain_body_is_its_consumers_to_restore() -> None:
    sent = Dated(date(2026, 1, 1), Decimal(1))
    assert codec_for(Dated).decode(*codec_for(None).encode("q", sent)) == sent


WRONG = [Plain("seven"), Struct("seven"), Model.model_construct(claim_id="seven")]  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_an_instance_whose_fields_are_of_another_type_is_refused(wrong: Any) -> None:
    for body in (type(wrong), None):
        with pytest.raises(MessageNotEncodable, match=type(wrong).__name__):
            codec_for(body).encode("q", wrong)
    with pytest.raises(MessageNotEncodable, match=type(wrong).__name__):
        codec_for(None).encode("q", {"claims": [wrong]})


def test_null_in_a_body_is_fine() -> None:
    assert codec_for(None).encode("q", {"a": None, "b": "null"}) == (JSON, b'{"a":null,"b":"null"}')


def test_a_pydantic_model_in_a_plain_body_is_written_by_pydantic() -> None:
    assert codec_for(None).encode("q", {"claim": Model(claim_id=7)}) == (JSON, b'{"claim":{"claim_id":7}}')


def test_a_type_that_nothing_can_decode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be the type"):
        codec_for(lambda: 1)


@dataclass
class Forward:
    claim: "Undefined"  # type: ignore[name-defined]  # noqa: F821


def test_a_type_whose_annotations_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Undefined"):
        codec_for(Forward)
    with pytest.raises(ConfigurationError, match="cannot be the type"):
        Queue("claims", body={"claim_id": int})  # type: ignore[arg-type]  # users are not all typed


def test_a_body_that_fails_when_it_is_read_is_refused() -> None:
    class Failing:
        @property
        def model_dump_json(self) -> str:
            raise KeyError("claim_id")

    released = memoryview(b"photo")
    released.release()
    for body in (Failing(), [Failing()], released):
        with pytest.raises(MessageNotEncodable, match="Nothing was sent"):
            codec_for(None).encode("q", body)


def test_the_text_of_a_group_of_errors_ends_with_the_last_of_them() -> None:
    """It ended with the rule that is drawn below them, so all groups were of one kind."""
    told = error_text(ExceptionGroup("in a TaskGroup", [ValueError("a"), ExceptionGroup("", [KeyError("policy")])]))
    assert told.rstrip().rpartition("\n")[2] == "KeyError: 'policy'"
    assert error_kind(told) == "KeyError"
    assert "ExceptionGroup: in a TaskGroup" in told


def test_an_error_text_survives_a_value_that_cannot_be_shown() -> None:
    class Nasty:
        __qualname__ = "Nasty"

        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert "RuntimeError" in shown(Nasty())
    assert len(shown("x" * 1000)) < 100


def test_what_a_signals_handler_raises_while_a_body_is_written_is_not_said_to_be_the_bodys() -> None:
    class Interrupt(Exception): ...

    @dataclass
    class Slow:
        claim_id: int

        def __post_init__(self) -> None:
            if made:
                raise Interrupt  # as a handler does, wherever the signal meets the program
            made.append(self)

    made: list[Slow] = []
    with pytest.raises(Interrupt):
        codec_for(Slow).encode("claims", Slow(7))
