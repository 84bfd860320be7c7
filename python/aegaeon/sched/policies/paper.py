"""Aegaeon's scheduler: Algorithm 1 (grouped prefill) and Algorithm 2 (batched decoding).

Algorithm 1. A request joins the first queued group of its model that ever held fewer than
MAX_GPSIZE requests, else it opens a group at the end of the queue; the requests of the front group
run one by one.

Algorithm 2. In rounds. Batch k of the round decodes for its quota q_k, with t_k its step time, d_k
its TPOT target, n_k = d_k / t_k and c the sum of the switch times of the models in the round:

    alpha = max( c / (min_k n_k * Q_MAX) + sum_k 1 / n_k, 0.5 )        (Eq. 3)
    q_i   = c / ( n_i * (alpha - sum_k 1 / n_k) )                      (Eq. 2)

A batch earns a buffer of 1 / alpha of the round, so the round attains min(1, 1 / alpha). Where the
first term of Eq. 3 rules, q_i = Q_MAX * min(n) / n_i, whatever c is; this is used for c = 0 too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aegaeon.sched.scheduler import ModelView, Phase, PoolState, Turn

MAX_GPSIZE = 8
Q_MAX_S = 4.0
ALPHA_FLOOR = 0.5


@dataclass(frozen=True, slots=True)
class Round:
    """quotas_s: one per batch, in the order given; attainment: what the round is predicted to."""

    alpha: float
    quotas_s: tuple[float, ...]

    @property
    def attainment(self) -> float:
        return min(1.0, 1.0 / self.alpha)


def plan_round(
    step_s: Sequence[float], tpot_s: Sequence[float], switch_s: float, *, q_max_s: float = Q_MAX_S
) -> Round:
    """Eq. 2 and 3 for batches of these step times and targets; `switch_s` is c."""
    n = [target / step for step, target in zip(step_s, tpot_s, strict=True)]
    load = sum(1.0 / each for each in n)
    rest = switch_s / (min(n) * q_max_s)
    if rest + load >= ALPHA_FLOOR:
        return Round(rest + load, tuple(q_max_s * min(n) / each for each in n))
    quotas = (switch_s / (each * (ALPHA_FLOOR - load)) for each in n)
    return Round(ALPHA_FLOOR, tuple(min(quota, q_max_s) for quota in quotas))


@dataclass(slots=True)
class Group:
    """`size` counts all requests ever added, `pending` those that still wait."""

    model: str
    size: int = 0
    pending: int = 0


class GroupedPrefill:
    """Algorithm 1 on one prefill instance."""

    def __init__(self, max_group_size: int = MAX_GPSIZE) -> None:
        if max_group_size < 1:
            raise ValueError(f"a group holds at least 1 request, got {max_group_size}")
        self._max_group_size = max_group_size
        self.groups: list[Group] = []

    def has_room(self, model: str) -> bool:
        """Whether a queued group takes one more request of `model`."""
        return self._open_group(model) is not None

    def add(self, model: str) -> None:
        group = self._open_group(model)
        if group is None:
            group = Group(model)
            self.groups.append(group)
        group.size += 1
        group.pending += 1

    def load_s(self, models: Iterable[ModelView], state: PoolState) -> float:
        """Estimated time of all pending groups, execution and switches: routing takes the least."""
        views = {view.name: view for view in models}
        seconds = 0.0
        previous = state.last
        for group in self.groups:
            view = views[group.model]
            mean_tokens = view.work.prefill_tokens // max(1, view.num_waiting)
            seconds += group.pending * state.costs.prefill_s(view.name, mean_tokens)
            if group.model != previous:
                seconds += state.costs.switch_s(view.weights_bytes)
            previous = group.model
        return seconds

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        self._agree_with(state)
        models = {view.name: view for view in state.models}
        for index, group in enumerate(self.groups):
            if models[group.model].runnable(now):
                following = (each.model for each in self.groups[index:])
                ahead = next((name for name in following if name != group.model), None)
                return Turn(
                    group.model,
                    max_steps=1,
                    phase=Phase.PREFILL,
                    prefetch=() if ahead is None else (ahead,),
                )
        return None

    def _open_group(self, model: str) -> Group | None:
        fitting = (
            group
            for group in self.groups
            if group.model == model and group.size < self._max_group_size
        )
        return next(fitting, None)

    def _agree_with(self, state: PoolState) -> None:
        """Take in what arrived, drop what was prefilled or ended: the state is the truth."""
        waiting = {view.name: view.num_waiting for view in state.models}
        queued = dict.fromkeys(waiting, 0)
        for group in self.groups:
            queued[group.model] = queued.get(group.model, 0) + group.pending
        for group in self.groups:
            gone = min(group.pending, max(0, queued[group.model] - waiting.get(group.model, 0)))
            group.pending -= gone
            queued[group.model] -= gone
        self.groups = [group for group in self.groups if group.pending]
        for arrival in state.arrived:
            if queued[arrival.model] < waiting[arrival.model]:
                self.add(arrival.model)
                queued[arrival.model] += 1
        # Those that were not announced, such as preempted ones.
        for view in sorted(state.models, key=lambda view: view.work.oldest_waiting_s):
            for _ in range(view.num_waiting - queued[view.name]):
                self.add(view.name)


class BatchedDecoding:
    """Algorithm 2 on one decode instance; with phase BOTH an engine's own mixed steps count."""

    def __init__(self, q_max_s: float = Q_MAX_S, phase: Phase = Phase.DECODE) -> None:
        if not q_max_s > 0:
            raise ValueError(f"Q_MAX must be more than 0 s, got {q_max_s}")
        self._q_max_s = q_max_s
        self._phase = phase
        self._round: list[tuple[str, float]] = []

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        models = {view.name: view for view in state.models}
        if not any(self._can_run(models.get(name), now) for name, _ in self._round):
            self._round = self._plan(state, now)
        while self._round:
            name, quota_s = self._round.pop(0)
            if self._can_run(models.get(name), now):
                ahead = (next_name for next_name, _ in self._round)
                prefetch = tuple(each for each in ahead if each != name)[:1]
                return Turn(name, quota_s=quota_s, phase=self._phase, prefetch=prefetch)
        return None

    def _can_run(self, view: ModelView | None, now: float) -> bool:
        if view is None or not view.runnable(now):
            return False
        return view.num_running > 0 or self._phase is not Phase.DECODE

    def _plan(self, state: PoolState, now: float) -> list[tuple[str, float]]:
        batches = [view for view in state.models if self._can_run(view, now)]
        if not batches:
            return []
        batches.sort(key=lambda view: view.work.oldest_arrival_s)
        costs = state.costs
        planned = plan_round(
            [
                costs.step_s(view.name, max(1, view.num_running), view.work.context_tokens)
                for view in batches
            ],
            [min(view.work.tpot_s, 3600.0) for view in batches],
            sum(costs.switch_s(view.weights_bytes) for view in batches),
            q_max_s=self._q_max_s,
        )
        return list(zip((view.name for view in batches), planned.quotas_s, strict=True))


class Paper:
    """Both algorithms on one device, which the paper does not do: the front group is prefilled,
    then one batch has its decode turn, and so on, each where the other has nothing to do.
    """

    def __init__(self, q_max_s: float = Q_MAX_S, max_group_size: int = MAX_GPSIZE) -> None:
        self.prefill = GroupedPrefill(max_group_size)
        self.decoding = BatchedDecoding(q_max_s)
        self._group: Group | None = None

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        prefill = self.prefill.next_turn(state, now)
        front = self.prefill.groups[0] if self.prefill.groups else None
        if prefill is not None and (self._group is None or front is self._group):
            self._group = front
            return prefill
        self._group = None
        return self.decoding.next_turn(state, now) or prefill
