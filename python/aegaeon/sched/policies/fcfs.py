"""First come, first served: the model of the oldest open request runs."""

from aegaeon.sched.scheduler import PoolState, Turn


class Fcfs:
    """Asked again after `quantum` steps. The oldest request runs until it ends, so nobody starves;
    requests of the same model share its steps.
    """

    def __init__(self, quantum: int = 8) -> None:
        self._quantum = quantum

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        runnable = [view for view in state.models if view.runnable(now)]
        if not runnable:
            return None
        oldest = min(runnable, key=lambda view: view.work.oldest_arrival_s)
        return Turn(oldest.name, max_steps=self._quantum)
