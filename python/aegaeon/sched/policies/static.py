"""Static placement, as MuxServe does: what fits is placed once, nothing is ever switched."""

from aegaeon.sched.scheduler import ModelView, PoolState, Turn


class Static:
    """Pinned models are placed first, then the others in pool order while they fit. The placed ones
    share the device step by step. Requests of the others are refused, never run: a baseline.
    """

    def __init__(self) -> None:
        self._placed: frozenset[str] | None = None

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        if self._placed is None:
            self._placed = place(state.models, state.capacity_bytes)
        runnable = [
            view for view in state.models if view.name in self._placed and view.runnable(now)
        ]
        if not runnable:
            return None
        longest = min(
            runnable,
            key=lambda view: view.work.oldest_arrival_s
            if view.last_run_s is None
            else max(view.last_run_s, view.work.oldest_arrival_s),
        )
        refuse = tuple(
            arrival.request.id for arrival in state.arrived if arrival.model not in self._placed
        )
        return Turn(longest.name, max_steps=1, refuse=refuse)


def place(models: tuple[ModelView, ...], capacity_bytes: int) -> frozenset[str]:
    """Those that fit together, weights and KV cache."""
    placed = set()
    free_bytes = capacity_bytes
    for view in sorted(models, key=lambda view: not view.pinned):
        size_bytes = view.weights_bytes + view.kv_bytes
        if size_bytes <= free_bytes:
            free_bytes -= size_bytes
            placed.add(view.name)
    return frozenset(placed)
