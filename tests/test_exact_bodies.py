"""A body of a declared type comes back equal and of its types, or is refused in words."""

import dataclasses
import enum
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Optional, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.alias_generators import to_camel
from typing_extensions import TypeAliasType, TypedDict  # pydantic wants this one before Python 3.12

from filao import ConfigurationError, MessageNotEncodable
from filao.codec import JSON, codec_for, seen_as

T = TypeVar("T")


def sent_to(body: Any, value: Any) -> Any:
    """Return what the consumer gets."""
    codec = codec_for(body)
    return codec.decode(*codec.encode("q", value))


@dataclass(eq=False)
class NoEq:
    claim_id: Any


@dataclass
class Base:
    claim_id: int


@dataclass
class Derived(Base):
    amount: int = 0


class Struct(msgspec.Struct):
    claim_id: int


class Model(pydantic.BaseModel):
    claim_id: int


class DerivedModel(Model):
    amount: int = 0


class Status(enum.StrEnum):
    OPEN = "open"


class Rank(enum.IntEnum):
    HIGH = 1


class Colour(enum.Enum):
    RED = "red"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Pair(NamedTuple):
    claim_id: int
    amount: float | None


class Typed(TypedDict):
    claim_id: int


@attrs.define
class Attrs:
    claim_id: int


@dataclass
class Node:
    claim_id: int
    children: "list[Node]" = field(default_factory=list["Node"])


@dataclass
class Boxed(Generic[T]):
    inside: T


class BoxedModel(pydantic.BaseModel, Generic[T]):
    inside: T


@pydantic.dataclasses.dataclass
class Checked:
    claim_id: int


class Camel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(alias_generator=to_camel, extra="forbid")
    claim_id: int

    @pydantic.computed_field
    def doubled(self) -> int:
        return 2 * self.claim_id


class WrittenOtherwise(pydantic.BaseModel):
    claim_id: int = pydantic.Field(serialization_alias="claimId")


M = TypeVar("M", bound=Model)


@dataclass
class OfModels(Generic[M]):
    inside: list[M]


class PartlyAliased(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    claim_id: int = pydantic.Field(alias="claimId")
    amount: int


class Counting(pydantic.BaseModel):
    claim_id: Annotated[int, pydantic.BeforeValidator(int)]


class Free(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    claim_id: Any


@dataclass
class Holder:
    model: Model
    others: dict[str, Model | None] = field(default_factory=dict[str, Model | None])


ClaimId = NewType("ClaimId", int)
PARIS = ZoneInfo("Europe/Paris")
TWICE = datetime(2020, 10, 25, 2, 30, tzinfo=PARIS, fold=1)  # an hour that this zone has twice


RETURNS: list[tuple[Any, Any]] = [
    (list[tuple[int, NoEq]], [(1, NoEq(1))]),
    (dict[int, NoEq], {1: NoEq(1)}),
    (tuple[NoEq, ...], (NoEq(1),)),
    (Attrs, Attrs(1)),
    (Pair, Pair(1, 2.5)),
    (Typed, {"claim_id": 1}),
    (Node, Node(1, [Node(2)])),
    (Boxed[tuple[int, int]], Boxed((1, 2))),
    (BoxedModel[tuple[int, int]], BoxedModel[tuple[int, int]](inside=(1, 2))),
    (Colour, Colour.RED),
    (Status, Status.OPEN),
    (dict[Rank, Rights], {Rank.HIGH: Rights.READ | Rights.WRITE}),
    (datetime, datetime(2026, 1, 1, 1, 2, 3, 456789)),  # noqa: DTZ001  # naive on purpose
    (datetime, datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=4)))),
    (date, date(2026, 1, 1)),
    (time, time(1, 2, 3, 4)),
    (time, time(1, tzinfo=UTC)),
    (timedelta, timedelta(days=-1, microseconds=1)),
    (UUID, UUID(int=7)),
    (list[Decimal], [Decimal("1.10"), Decimal("NaN")]),
    (frozenset[tuple[int, int]], frozenset({(1, 2)})),
    (set[Decimal], {Decimal("1.5"), Decimal(2)}),
    (Literal["a", 1], "a"),
    (ClaimId, ClaimId(7)),
    (Annotated[int, msgspec.Meta(gt=0)], 1),
    (bytes, b"raw"),
    (Optional[bytes], b"raw"),  # noqa: UP045  # as many write it
    (list[bytes], [b"raw"]),
    (list[Model], [Model(claim_id=1)]),
    (dict[str, Model], {"a": Model(claim_id=1)}),
    (Model | None, Model(claim_id=1)),
    (Model | None, None),
    (Model | int, 7),
    (Holder, Holder(Model(claim_id=1), {"a": Model(claim_id=2), "b": None})),
    (Checked, Checked(1)),
    (Camel, Camel(claimId=1)),  # type: ignore[call-arg]
    (PartlyAliased, PartlyAliased(claimId=1, amount=2)),
    (WrittenOtherwise, WrittenOtherwise(claim_id=1)),
    (OfModels, OfModels([Model(claim_id=1)])),
    (TypeAliasType("Models", list[Model]), [Model(claim_id=1)]),
    (list[WrittenOtherwise | Model], [WrittenOtherwise(claim_id=1)]),
    (Free, Free(claim_id=1, note=["free"])),  # type: ignore[call-arg]
]


@pytest.mark.parametrize(("body", "value"), RETURNS, ids=repr)
def test_a_body_comes_back_as_it_was(body: Any, value: Any) -> None:
    assert told(sent_to(body, value)) == told(value)


@dataclass
class Loud:
    claim_id: int

    def __post_init__(self) -> None:
        self.claim_id *= 2


@dataclass
class Careless:
    claim_id: int
    extra: Any = field(default=None, compare=False)


class Secret(pydantic.BaseModel):
    token: pydantic.SecretStr


class Doubling(pydantic.BaseModel):
    claim_id: int

    @pydantic.field_validator("claim_id")
    @classmethod
    def twice(cls, value: int) -> int:
        return 2 * value


class Adding(pydantic.BaseModel):
    claim_id: int

    @pydantic.field_serializer("claim_id")
    def more(self, value: int) -> int:
        return value + 1


class Endless(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(ser_json_inf_nan="constants")
    amount: float


class Partial(pydantic.BaseModel):
    claim_id: int
    hidden: int = pydantic.Field(default=0, exclude=True)


class Opaque(pydantic.BaseModel):
    claim_id: Any
    other: object = None


@attrs.define
class Private:
    claim_id: int
    _hidden: int = 0


@dataclass
class Amount:
    value: float
    photo: bytes = b""
    lines: Sequence[int] = ()


CHANGES: list[tuple[Any, Any, str]] = [
    (Base, Derived(1, 2), "the Derived would come back as a Base"),
    (list[Base], [Derived(1)], r"the Derived at \[0\]"),
    (Model, DerivedModel(claim_id=1, amount=2), "the DerivedModel would come back as a Model"),
    (Base, {"claim_id": 1}, "the dict would come back as a Base"),
    (Model, {"claim_id": 1, "more": 2}, "the dict would come back as a Model"),
    (Typed, {"claim_id": 1, "more": 2}, "the key 'more' would be lost"),
    (Loud, Loud(1), r"2 at \.claim_id would come back as 4"),
    (Careless, Careless(1, (2,)), r"the tuple at \.extra would come back as a list"),
    (list[Careless], [Careless(1, (2,))], r"the tuple at \[0\]\.extra would come back as a list"),
    (Secret, Secret(token=pydantic.SecretStr("hunter2")), r"at \.token would come back as SecretStr"),
    (Counting, Counting.model_construct(claim_id=True), "the bool at .claim_id would come back as an int"),
    (Doubling, Doubling(claim_id=1), "2 at .claim_id would come back as 4"),
    (Adding, Adding(claim_id=1), "1 at .claim_id would come back as 2"),
    (Endless, Endless(amount=math.inf), "JSON is malformed"),
    (Partial, Partial(claim_id=1, hidden=5), r"5 at \.hidden would come back as 0"),
    (Opaque, Opaque(claim_id=Decimal("1.5")), r"the Decimal at \.claim_id would come back as a str"),
    (Opaque, Opaque(claim_id=1, other={1}), r"the set at \.other would come back as a list"),
    (Opaque, Opaque(claim_id={1: 2}), r"the key 1 at \.claim_id would come back as a text"),
    (Opaque, Opaque(claim_id=math.nan), r"nan at \.claim_id is no number that JSON has"),
    (Free, Free(claim_id=1, note=(1,)), r"the tuple at \.model_extra\['note'\]"),  # type: ignore[call-arg]
    (Private, Private(1, 2), r"2 at \._hidden would come back as 0"),
    (Amount, Amount(2**53 + 1), r"9007199254740993 at \.value would come back as 9007199254740992\.0"),
    (Amount, Amount(1, "cafe"), r"the str at \.photo would come back as a bytes"),  # type: ignore[arg-type]
    (Amount, Amount(1, b"", (1,)), r"the tuple at \.lines would come back as a list"),
    (bytes, "cafe", "Expected raw `bytes`, got JSON"),
    (Optional[bytes], "cafe", "the str would come back as a bytes"),  # noqa: UP045
    (Base, b"raw", "it is raw bytes"),
    (str, b"raw", "the bytes would come back as a str"),
    (Decimal, 1.5, "the float would come back as a Decimal"),
    (set[int], [1, 1], "the list would come back as a set"),
    (set[Decimal], {1.5}, "the float at"),
    (dict[Decimal, int], {1.5: 1}, "the float"),
    (tuple[int, float | None], Pair(1, 2.5), "the Pair would come back as a tuple"),
    (Pair, (1, 2.5), "the tuple would come back as a Pair"),
    (Colour, "red", "the str would come back as a Colour"),
    (dict[Status, int], {"open": 1}, "the str"),
    (time, time(1, tzinfo=PARIS), "would come back as"),
    (dict[str, Any], {"claim": NoEq(1)}, r"the NoEq at \['claim'\] would come back as a dict"),
    (list[Model], [Base(1)], "the Base at"),
    (Annotated[int, msgspec.Meta(gt=0)], -1, ">= 1"),
]


@pytest.mark.parametrize(("body", "value", "why"), CHANGES, ids=repr)
def test_a_body_that_would_come_back_otherwise_is_refused(body: Any, value: Any, why: str) -> None:
    with pytest.raises(MessageNotEncodable, match=f"queue 'q'.*{why}.*Nothing was sent"):
        codec_for(body).encode("q", value)


@pytest.mark.parametrize(
    ("body", "value", "came"),
    [
        (float, 7, 7.0),
        (str, Status.OPEN, "open"),
        (Any, [Status.OPEN, Rank.HIGH], ["open", 1]),
        (None, {"status": Status.OPEN}, {"status": "open"}),
        (dict[str, int], OrderedDict(a=1), {"a": 1}),
        (datetime, TWICE, TWICE.replace(tzinfo=timezone(timedelta(hours=1)), fold=0)),
    ],
    ids=repr,
)
def test_what_is_of_a_derived_class_comes_back_as_the_plain_value_it_is(body: Any, value: Any, came: Any) -> None:
    assert told(sent_to(body, value)) == told(came)


def test_a_class_of_the_same_name_is_another() -> None:
    class Base:
        pass

    other = dataclasses.make_dataclass("Base", ["claim_id"])
    with pytest.raises(MessageNotEncodable, match="the Base would come back as another class of that name"):
        codec_for(globals()["Base"]).encode("q", other(7))


def test_models_in_a_plain_body_are_written_as_their_consumer_reads_them() -> None:
    for value in (Camel(claimId=1), WrittenOtherwise(claim_id=1)):  # type: ignore[call-arg]
        assert codec_for(type(value)).decode(*codec_for(None).encode("q", value)) == value
    with pytest.raises(MessageNotEncodable, match=r"5 at \['claim'\]\.hidden would come back as 0"):
        codec_for(None).encode("q", {"claim": Partial(claim_id=1, hidden=5)})


class Mixed(msgspec.Struct):
    model: Model


class Unready(pydantic.BaseModel):
    claim: "Undefined"  # type: ignore[name-defined]  # noqa: F821


@dataclass
class Filed:
    path: Path


@dataclass
class FiledTree:
    branches: "list[FiledTree]"
    path: Path


@dataclass
class Maybe:
    path: Path | None = None


@dataclass
class Either:
    path: Path | None


@pytest.mark.parametrize(
    "body", [Mixed, Unready, list[Unready], Model | Struct, Path, list[Path], Filed, FiledTree], ids=repr
)
def test_a_type_that_neither_msgspec_nor_pydantic_reads_is_refused_when_it_is_declared(body: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot be the type of a queue's bodies"):
        codec_for(body)


def test_a_model_is_found_behind_any_number_of_other_types() -> None:
    """What annotations written as texts become lives no longer than it is looked at; another may have its id."""
    names = {"__module__": __name__}
    others = [dataclasses.make_dataclass("Other", [("it", "list[int]")], namespace=names) for _ in range(50)]
    last = dataclasses.make_dataclass("Last", [("it", "list[Model]")], namespace=names)
    body = tuple.__class_getitem__((*others, last))
    sent = (*(other([1]) for other in others), last([Model(claim_id=1)]))
    for _ in range(5):
        codec_for.cache_clear()  # type: ignore[attr-defined]
        assert sent_to(body, sent) == sent


def test_a_type_may_name_what_json_has_not_where_it_can_be_left_out() -> None:
    assert sent_to(Maybe, Maybe()) == Maybe()
    assert sent_to(Either, Either(None)) == Either(None)
    with pytest.raises(MessageNotEncodable, match="JSON cannot hold a PosixPath"):
        codec_for(Maybe).encode("q", Maybe(Path("claims")))


@pytest.mark.parametrize(
    ("body", "key", "told"),
    [(None, None, "a NoneType"), (None, True, "a bool"), (dict[tuple[int, int], int], (1, 2), "a tuple")],
    ids=repr,
)
def test_a_key_that_json_has_not_is_told_as_a_key(body: Any, key: Any, told: str) -> None:
    with pytest.raises(MessageNotEncodable, match=f"no key in JSON can be {told}; send a text in its place"):
        codec_for(body).encode("q", {key: 1})


def test_a_type_whose_own_code_fails_when_it_is_read_makes_a_malformed_body() -> None:
    @dataclass
    class Looking:
        claim_id: int

        def __post_init__(self) -> None:
            if self.claim_id == 7:
                raise KeyError(self.claim_id)

    sent = Looking(8)
    sent.claim_id = 7
    with pytest.raises(MessageNotEncodable, match=r"is not a .*Looking: reading it raised KeyError\(7\)"):
        codec_for(Looking).encode("q", sent)
    with pytest.raises(ValueError, match="reading it raised KeyError: 7"):
        codec_for(Looking).decode(JSON, b'{"claim_id": 7}')
    assert seen_as(Looking, {"claim_id": 7}) == {"claim_id": 7}


def test_a_want_of_memory_is_not_the_fault_of_the_body() -> None:
    @dataclass
    class Large:
        def __post_init__(self) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        codec_for(Large).decode(JSON, b"{}")


def test_json_is_no_bytes() -> None:
    with pytest.raises(ValueError, match="got JSON"):
        codec_for(bytes).decode(JSON, b'"cafe"')


FIELDS: list[Any] = [
    *(Any, object, int, float, str, bytes, bool, Decimal, date, datetime, UUID, Colour, Base, Model),
    *(list[int], tuple[int, ...], tuple[int, Decimal], set[str], frozenset[float], dict[str, Any], dict[int, float]),
    *(list[Decimal | None], Sequence[int], Mapping[str, int], Literal[1, "a"], Typed, Pair, list[Base], Base | None),
]
LEAVES: st.SearchStrategy[Any] = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3)),
    *(st.decimals(allow_nan=False), st.dates(), st.datetimes(), st.timedeltas(), st.uuids(), st.sampled_from(Colour)),
)
KEYS = st.integers() | st.text(max_size=3)
VALUES: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=2), st.tuples(inner), st.tuples(inner, inner), st.dictionaries(KEYS, inner)),
        *(st.sets(LEAVES, max_size=2), st.frozensets(LEAVES, max_size=2), st.builds(Base, inner)),
        *(st.builds(Model.model_construct, claim_id=inner), st.builds(Pair, inner, inner)),
        *(st.builds(dict, claim_id=inner), st.builds(Derived, inner)),
    ),
    max_leaves=4,
)


@cache
def holding(maker: str, inside: Any) -> Any:
    """Return a class with a field of a type."""
    match maker:
        case "dataclass":
            return dataclasses.make_dataclass("Holding", [("it", inside)])
        case "without __eq__":
            return dataclasses.make_dataclass("Holding", [("it", inside)], eq=False)
        case "Struct":
            return msgspec.defstruct("Holding", [("it", inside)])
        case _:
            return pydantic.create_model("Holding", it=(inside, ...))


@settings(derandomize=True, max_examples=200)
@given(
    st.sampled_from(["dataclass", "without __eq__", "Struct", "pydantic"]),
    st.sampled_from(FIELDS),
    st.one_of(VALUES, st.integers(), st.lists(st.integers(), max_size=3)),
)
def test_whatever_a_field_holds_comes_back_as_it_was_or_is_refused(maker: str, inside: Any, value: Any) -> None:
    try:
        codec = codec_for(body := holding(maker, inside))
    except ConfigurationError:
        return
    sent = body.model_construct(it=value) if maker == "pydantic" else body(value)
    try:
        content = codec.encode("q", sent)
    except MessageNotEncodable:
        return
    assert told(codec.decode(*content)) == told(sent)


def told(value: Any) -> Any:
    """Return a value with the types of all its parts, for comparison; an int that a float holds exactly is as good."""
    inside: Any
    match value:
        case bool() | enum.Enum():
            inside = repr(value)
        case int() if abs(value) < 2**1000 and float(value) == value:
            return told(float(value))
        case datetime() | time():
            inside = repr(value.replace(fold=0))  # which is no part of their equality
        case dict():
            inside = [(told(key), told(item)) for key, item in value.items()]
        case list() | tuple():
            inside = [told(item) for item in value]
        case set() | frozenset():
            inside = sorted((told(item) for item in value), key=repr)
        case msgspec.Struct():
            inside = [(name, told(getattr(value, name))) for name in value.__struct_fields__]
        case pydantic.BaseModel():
            inside = [(name, told(item)) for name, item in value]
        case _ if hasattr(value, "__dict__"):
            inside = [(name, told(item)) for name, item in vars(value).items()]
        case _:
            inside = repr(value)
    return type(value), inside
