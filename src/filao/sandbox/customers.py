"""The insurer's customers: what they report, how often they come, and the numbers that their claims get."""

import heapq
from random import Random
from typing import Any, NamedTuple

ARRIVING_MAX = 50  # claims that come in by themselves between two looks
BEHIND_MAX = 1.0  # seconds of arrivals that are made up for after a pause of the program
POLICIES = (12, 27, 33, 48, 56, 71)
KINDS = ("collision", "glass", "water", "storm", "theft", "hail", "fire")


class Case(NamedTuple):
    """What a customer reports; the claim gets its number when it is handed in."""

    policy: int
    amount: int
    kind: str
    effort: float = 1.0


class Customers:
    """Makes up what is not given, always the same for the same lesson."""

    def __init__(self) -> None:
        self.last_claim: int = 0
        self._free: list[int] = []
        """Numbers whose claims the queue refused, a heap."""
        self._chance = Random(7)
        self._next_arrival = 0.0

    @property
    def upcoming(self) -> int:
        """The number of the next claim."""
        return self._free[0] if self._free else self.last_claim + 1

    def next_number(self) -> int:
        """Give a claim its number."""
        if self._free:
            return heapq.heappop(self._free)
        self.last_claim += 1
        return self.last_claim

    def take_back(self, number: int) -> None:
        """Take back the number of a claim that the queue refused, for the next one."""
        heapq.heappush(self._free, number)

    def due(self, rate: float, now: float) -> int:
        """Return how many customers have come by themselves since the last call, at `rate` per second on average."""
        if not rate:
            self._next_arrival = now
            return 0
        due = 0
        while self._next_arrival <= now and due < ARRIVING_MAX:
            self._next_arrival += self._chance.expovariate(rate)
            due += 1
        self._next_arrival = max(self._next_arrival, now - BEHIND_MAX)
        return due

    def cases(self, count: int, **told: Any) -> list[Case]:
        """Make up cases, except for what is given of them."""
        return [self.case(**told) for _ in range(count)]

    def case(
        self, *, policy: int | None = None, amount: int | None = None, kind: str = "", effort: float = 1.0
    ) -> Case:
        """Make up what is not given of a case."""
        return Case(
            self._chance.choice(POLICIES) if policy is None else policy,
            self._chance.randrange(20_000, 900_000) if amount is None else amount,
            kind or self._chance.choice(KINDS),
            effort,
        )
