"""Admission: whether the first token of a new request can be on time, and else when to come back.

An estimate, not a promise. Prompts are counted in the order of their deadlines (the order in which
as many as possible are on time): first those of the same model that wait, and those of other models
whose earliest deadline comes before the new one; each model that is not on the device costs its
switch. Of the device's time, what the decoding requests need to keep their pace (a step per TPOT)
is taken off first.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType

from aegaeon.sched.scheduler import PoolState

# However many requests decode, prompts get this share of the device: a policy lets tokens be late
# before it lets anybody starve.
MIN_PREFILL_SHARE = 0.1


def first_token_in_s(
    state: PoolState,
    model: str,
    *,
    prompt_tokens: int,
    ttft_s: float,
    now: float,
    ahead: Mapping[str, int] = MappingProxyType({}),
) -> float:
    """Seconds from now until a new request of `model` would get its first token.

    ahead: prompt tokens by model that `state` does not know of yet. 0.0 for a model that is not in
    `state`. Linear in the number of models.
    """
    costs, due_s = state.costs, now + ttft_s
    if all(view.name != model for view in state.models):
        return 0.0
    busy_s = decoding_share = 0.0
    for view in state.models:
        work, mine = view.work, view.name == model
        if view.num_running:
            step_s = costs.step_s(view.name, view.num_running, work.context_tokens)
            decoding_share += step_s / work.tpot_s
        tokens = work.prefill_tokens if mine or work.first_due_s <= due_s else 0
        tokens += ahead.get(view.name, 0) + (prompt_tokens if mine else 0)
        if tokens:
            busy_s += costs.switch_s(view.missing_bytes) + costs.prefill_s(view.name, tokens)
    return busy_s / max(MIN_PREFILL_SHARE, 1.0 - decoding_share)


class Admission:
    """Decides by what the step loop saw last, and by what was let in since; from any one thread.

    seen: the state that the policy was asked with last, and when; None before the first time.
    """

    def __init__(self, seen: Callable[[], tuple[PoolState, float] | None]) -> None:
        self._seen = seen
        self._let_in: list[tuple[float, str, int]] = []  # when, model, prompt tokens

    def late_by_s(self, model: str, *, prompt_tokens: int, ttft_s: float, now: float) -> float:
        """0.0: it is let in. Else how much too late its first token would be, in seconds."""
        seen = self._seen()
        if seen is None:
            return 0.0
        state, at = seen
        self._let_in = [each for each in self._let_in if each[0] > at]
        ahead = Counter[str]()
        for _, name, tokens in self._let_in:
            ahead[name] += tokens
        first_s = first_token_in_s(
            state, model, prompt_tokens=prompt_tokens, ttft_s=ttft_s, now=now, ahead=ahead
        )
        if first_s > ttft_s:
            return first_s - ttft_s
        self._let_in.append((now, model, prompt_tokens))
        return 0.0
