"""Round robin with a quantum of engine steps: the simplest policy that never starves a model."""

from aegaeon.sched.scheduler import PoolState, Turn


class RoundRobin:
    """Every model with open requests gets at most `quantum` steps, in the pool's order.

    A model alone with work gets turn after turn without a pause. A turn ends early when its
    model runs out of work. Bound on starvation: a model with work waits for at most
    `(models with work - 1) * quantum` steps of others.
    """

    def __init__(self, quantum: int) -> None:
        if quantum < 1:
            raise ValueError(f"quantum must be at least 1 step, got {quantum}")
        self.quantum = quantum

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        names = [model.name for model in state.models]
        start = names.index(state.last) + 1 if state.last in names else 0
        for model in state.models[start:] + state.models[:start]:
            if model.runnable(now):
                return Turn(model=model.name, max_steps=self.quantum)
        return None
