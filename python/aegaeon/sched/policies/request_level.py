"""Request-level scaling, as ServerlessLLM does: switch only when a model's requests have ended."""

from aegaeon.sched.scheduler import PoolState, Turn


class RequestLevel:
    """Then the model of the oldest request is next. Requests that arrive for the running model join
    it, so a model that always has work keeps the device: a baseline, not a fair policy.
    """

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        runnable = [view for view in state.models if view.runnable(now)]
        if not runnable:
            return None
        running = next((view for view in runnable if view.name == state.last), None)
        chosen = running or min(runnable, key=lambda view: view.work.oldest_arrival_s)
        return Turn(chosen.name)
