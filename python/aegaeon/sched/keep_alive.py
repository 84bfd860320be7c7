"""How long a model that has nothing to do stays on the device while nobody needs the room."""

from collections.abc import Mapping

from aegaeon.sched.scheduler import PoolState

# How exact it is.
LOOK_INTERVAL_S = 0.5


class KeepAlive:
    """limits_s: by model; None, or a model that is not in it: time alone never ends its stay.

    A stay without work begins when it is first seen: after the last request, a load by order, a
    prefetch.
    """

    def __init__(self, limits_s: Mapping[str, float | None] | None = None) -> None:
        self.limits_s: dict[str, float | None] = dict(limits_s or {})
        self._idle_since_s: dict[str, float] = {}
        self._next_look_s = 0.0

    def overdue(self, state: PoolState, now: float) -> list[str]:
        """The resident models whose time is over; each once, until it has been away or worked.

        Looks at most every LOOK_INTERVAL_S.
        """
        if now < self._next_look_s:
            return []
        self._next_look_s = now + LOOK_INTERVAL_S
        before, self._idle_since_s = self._idle_since_s, {}
        found = []
        for view in state.models:
            limit_s = self.limits_s.get(view.name)
            if limit_s is None or view.has_work or not view.resident:
                continue
            since_s = before.get(view.name, now)
            if now - since_s >= limit_s:
                found.append(view.name)
                since_s = now  # asked again only after as long, should it stay nevertheless
            self._idle_since_s[view.name] = since_s
        return found
