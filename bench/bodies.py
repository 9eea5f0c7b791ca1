"""What it costs in CPU to write a body and to see that it comes back as it was. Run: python -m bench.bodies

It tells the least of many rounds, which a busy machine disturbs least. To compare two versions, run it with each `src`
in turn, several times: PYTHONPATH=src python -m bench.bodies
"""

import time
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic

from filao.codec import codec_for

ROUNDS, CALLS = 60, 200


@dataclass
class Claim:
    claim_id: int
    holder: str
    amount: float
    lines: list[str]
    note: str | None = None


class ClaimStruct(msgspec.Struct):
    claim_id: int
    holder: str
    amount: float
    lines: list[str]
    note: str | None = None


class ClaimModel(pydantic.BaseModel):
    claim_id: int
    holder: str
    amount: float
    lines: list[str]
    note: str | None = None


FIELDS: dict[str, Any] = {
    "claim_id": 7,
    "holder": "Payet",
    "amount": 12.5,
    "lines": ["roof", "door"],
    "note": "x" * 100,
}
BODIES: dict[str, tuple[Any, Any]] = {
    "a dict": (None, FIELDS),
    "a dict, declared": (dict, FIELDS),
    "a Struct": (ClaimStruct, ClaimStruct(**FIELDS)),
    "a dataclass": (Claim, Claim(**FIELDS)),
    "100 dataclasses": (list[Claim], [Claim(**FIELDS)] * 100),
    "a pydantic model": (ClaimModel, ClaimModel(**FIELDS)),
    "a dataclass, no type": (None, Claim(**FIELDS)),
    "a model, no type": (None, ClaimModel(**FIELDS)),
}


def _cost(body: Any, value: Any) -> float:
    """Return the seconds of CPU that one body takes."""
    encode = codec_for(body).encode
    least = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(CALLS):
            encode("claims", value)
        least = min(least, (time.process_time() - began) / CALLS)
    return least


def main() -> None:
    """Print the least of all rounds, in microseconds."""
    for name, (body, value) in BODIES.items():
        print(f"{name:<20} {1e6 * _cost(body, value):7.2f} µs of CPU (least of {ROUNDS})")


if __name__ == "__main__":
    main()
