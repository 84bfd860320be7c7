"""Least slack first, with what a switch really costs now.

The slack of a model is the time that may pass before its switch must begin for its next token to
be on time: due - now - switch - (prefill or step), with switch = 0 when nothing is missing. So the
model that runs has an advantage over all others of exactly one switch. Of the tokens that its
requests wait for, the first counts that can still be on time: one that is late already does not
speak for the others.

1. Whoever has waited longer than `max_wait_s` runs, longest first: nobody starves.
2. Among those still on time that would be late after one more turn of another: least slack first.
3. Else those that are late, the least late first: being nearest it is on time again soonest, and a
   late token helps nobody who could still be on time.
4. Else the least slack.

Priorities come before slack in 2 to 4. A turn lasts until somebody else's slack is used up, at
least as long as its own switch took (against thrashing), at most OVERHEAD switches of the costliest
runnable model and `q_max_s`: what is hot is shared step by step, what is far away in longer turns.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from aegaeon.sched.scheduler import ModelView, PoolState, Turn

Q_MAX_S = 4.0
MAX_WAIT_S = 20.0
# A turn of this many switch times spends 1 / (1 + OVERHEAD) of the device on switching.
OVERHEAD = 2.0


class _Candidate(NamedTuple):
    view: ModelView
    slack_s: float
    switch_s: float
    waited_s: float


class Slack:
    """A model with work waits for at most `max_wait_s` and one turn and switch of each model that
    has waited longer.
    """

    def __init__(self, q_max_s: float = Q_MAX_S, max_wait_s: float = MAX_WAIT_S) -> None:
        if not q_max_s > 0 or not max_wait_s > 0:
            raise ValueError(f"times must be more than 0 s, got {q_max_s} and {max_wait_s}")
        self._q_max_s = q_max_s
        self._max_wait_s = max_wait_s

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        candidates = [_weigh(view, state, now) for view in state.models if view.runnable(now)]
        if not candidates:
            return None
        costliest_s = max(candidate.switch_s for candidate in candidates)
        longest_s = min(self._q_max_s, OVERHEAD * costliest_s)
        guard_s = longest_s + costliest_s

        def rank(candidate: _Candidate) -> tuple[int, float, float]:
            slack_s, priority = candidate.slack_s, candidate.view.work.priority
            if candidate.waited_s > self._max_wait_s:
                return (0, -candidate.waited_s, 0.0)
            if 0 <= slack_s < guard_s:
                return (1, priority, slack_s)
            return (2, priority, -slack_s) if slack_s < 0 else (3, priority, slack_s)

        chosen = min(candidates, key=rank)
        others = [candidate for candidate in candidates if candidate is not chosen]
        on_time = (other.slack_s for other in others if other.slack_s >= 0)
        quota_s = min(longest_s, max(chosen.switch_s, min(on_time, default=math.inf)))
        name = chosen.view.name
        missing = (other for other in others if other.view.missing_bytes)
        ahead = min(missing, key=rank, default=None)
        prefetch = () if ahead is None else (ahead.view.name,)
        busy = [other for other in others if other is not ahead and _evictable(other.view)]
        busy.sort(key=rank, reverse=True)
        return Turn(
            name,
            quota_s=quota_s,
            prefetch=prefetch,
            evict_first=(*_idle_longest(state, now), *(other.view.name for other in busy)),
        )


def _weigh(view: ModelView, state: PoolState, now: float) -> _Candidate:
    work, costs = view.work, state.costs
    switch_s = costs.switch_s(view.missing_bytes)
    step_s = costs.step_s(view.name, max(1, view.num_running), work.context_tokens)
    slack_s = _slack_s(work.next_dues_s, now + switch_s + step_s)
    if view.num_waiting:
        first_s = costs.prefill_s(view.name, work.first_prompt_tokens)
        slack_s = _nearest(slack_s, _slack_s(work.first_dues_s, now + switch_s + first_s))
    since_s = work.oldest_arrival_s
    if view.last_run_s is not None:
        since_s = max(since_s, view.last_run_s)
    return _Candidate(view, slack_s, switch_s, now - since_s)


def _slack_s(dues_s: Sequence[float], ready_s: float) -> float:
    """Of the first token that can still be on time when the first is ready at `ready_s`; else of
    the last that is late. dues_s: sorted.
    """
    if not dues_s:
        return math.inf
    index = bisect_left(dues_s, ready_s)
    return dues_s[min(index, len(dues_s) - 1)] - ready_s


def _nearest(slack_s: float, other_s: float) -> float:
    """The smaller one of those that are on time, else the one that is less late."""
    if slack_s >= 0 and other_s >= 0:
        return min(slack_s, other_s)
    return max(slack_s, other_s)


def _evictable(view: ModelView) -> bool:
    return view.resident and not view.pinned


def _idle_longest(state: PoolState, now: float) -> list[str]:
    """What has nothing to do now and may go, the longest unused first."""
    idle = [view for view in state.models if _evictable(view) and not view.runnable(now)]
    idle.sort(key=lambda view: -math.inf if view.last_run_s is None else view.last_run_s)
    return [view.name for view in idle]
