"""Whose turn it is, among queues that share a worker's capacity: in the long run each gets its weight's share.

Stride scheduling (Waldspurger and Weihl, 1995): each has a pass that grows, by what it got over its weight; the lowest
goes first. Whoever had nothing to do does not save up turns.
"""

from collections.abc import Mapping


class Turns:
    """Orders names by their turn."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._passes = dict.fromkeys(weights, 0.0)

    def order(self) -> list[str]:
        """Return the names, the one whose turn it is first."""
        return sorted(self._passes, key=self._passes.__getitem__)

    def share(self, name: str, room: int) -> int:
        """Return how much of the room one should ask for at its turn: its weight's part, at least one."""
        return max(1, int(room * self._weights[name] / sum(self._weights.values())))

    def took(self, name: str, count: int) -> None:
        """Count what one took."""
        self._passes[name] += count / self._weights[name]

    def had_nothing(self, name: str) -> None:
        """Let one whose queue was empty stand where the others are."""
        others = (passed for other, passed in self._passes.items() if other != name)
        self._passes[name] = max(self._passes[name], min(others, default=0.0))
