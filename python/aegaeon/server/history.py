"""What a listener of `/admin/events` has heard: the last state, and the past to draw it with."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

SECONDS_KEPT = 120.0


class Cell(NamedTuple):
    """Shares of one stretch of time, from 0 to 1, that a model's switches and steps took."""

    switch: float
    step: float


@dataclass(frozen=True)
class Recent:
    """What one model got within `seconds`."""

    seconds: float
    tokens: int
    tokens_on_time: int
    requests_met: int
    requests_missed: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def on_time(self) -> float | None:
        """Share of tokens; None without one."""
        return self.tokens_on_time / self.tokens if self.tokens else None


class History:
    """Snapshots in their order, as `/admin/events?with=timeline` sends them.

    One whose clock or counters went back is that of a server that was started anew: what came
    before is forgotten.
    """

    def __init__(self) -> None:
        self.state: Mapping[str, Any] | None = None
        self.slice_s = 1.0
        self._slices: dict[int, Mapping[str, tuple[float, float]]] = {}
        self._counts: deque[tuple[float, dict[str, Mapping[str, int]]]] = deque()

    def add(self, snapshot: Mapping[str, Any]) -> None:
        """Take in the next one."""
        state, timeline = snapshot["state"], snapshot.get("timeline")
        if self.state is not None and _began_anew(self.state, state):
            self._slices.clear()
            self._counts.clear()
        self.state = state
        now = state["now"]
        counts = {model["name"]: model["slo"] for model in state["models"]}
        self._counts.append((now, counts))
        while now - self._counts[0][0] > SECONDS_KEPT:
            self._counts.popleft()
        if timeline is not None:
            self.slice_s = timeline["slice_s"]
            for each in timeline["slices"]:
                self._slices[each["number"]] = each["models"]
            oldest = (now - SECONDS_KEPT) / self.slice_s
            for number in [number for number in self._slices if number < oldest]:
                del self._slices[number]

    def cells(self, model: str, num_cells: int, slices_per_cell: int = 1) -> list[Cell]:
        """The last stretches of time of `model`, oldest first; the newest may not be over yet."""
        if self.state is None:
            return []
        end = int(self.state["now"] / self.slice_s) + 1
        length_s = slices_per_cell * self.slice_s
        cells = []
        for first in range(end - num_cells * slices_per_cell, end, slices_per_cell):
            switch_s = step_s = 0.0
            for number in range(first, first + slices_per_cell):
                share = self._slices.get(number, {}).get(model, (0.0, 0.0))
                switch_s, step_s = switch_s + share[0], step_s + share[1]
            cells.append(Cell(min(1.0, switch_s / length_s), min(1.0, step_s / length_s)))
        return cells

    def recent(self, model: str, seconds: float = 60.0) -> Recent:
        """Between the last snapshot and the first that is at most `seconds` older."""
        now, after = self._counts[-1]
        began, before = next(each for each in self._counts if now - each[0] <= seconds)
        names = ("tokens", "tokens_on_time", "requests_met", "requests_missed")
        zero = dict.fromkeys(names, 0)
        old, new = before.get(model, zero), after.get(model, zero)
        return Recent(now - began, *(new[name] - old[name] for name in names))


def _began_anew(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return bool(
        after["now"] < before["now"] or after["loop"]["decisions"] < before["loop"]["decisions"]
    )
