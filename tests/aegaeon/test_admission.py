"""Admission: the estimate on states whose answer is plain, and what it makes of them."""

import pytest

from aegaeon.sched.admission import Admission, first_token_in_s
from aegaeon.sched.cost import CostModel, Profile
from aegaeon.sched.scheduler import NO_WORK, ModelView, PoolState, Work

# A step 10 ms, a prompt 20 ms + 1 ms per token; a switch 1 s per 10 bytes.
COSTS = CostModel(default=Profile(0.01, 0.0, 0.0, 0.02, 1e-3), link_bytes_per_s=10.0)


def view(name: str, *, running: int = 0, missing: int = 0, work: Work = NO_WORK) -> ModelView:
    waiting = 1 if work.prefill_tokens else 0
    return ModelView(
        name, running, waiting, running + waiting > 0, not missing, work=work, missing_bytes=missing
    )


def waiting(tokens: int, *, due_s: float) -> Work:
    return Work(prefill_tokens=tokens, first_dues_s=(due_s,))


def first(*models: ModelView, ttft_s: float = 5.0, **options: object) -> float:
    state = PoolState(models, costs=COSTS)
    return first_token_in_s(state, "a", prompt_tokens=80, ttft_s=ttft_s, now=100.0, **options)


def test_alone_and_resident_it_takes_its_prompt():
    assert first(view("a")) == pytest.approx(0.1)


def test_what_is_not_on_the_device_is_switched_to_once():
    assert first(view("a", missing=20, work=waiting(100, due_s=101.0))) == pytest.approx(2.2)


def test_others_come_before_it_if_they_are_due_before_it():
    late, early = waiting(500, due_s=106.0), waiting(500, due_s=104.0)
    assert first(view("a"), view("b", missing=10, work=late)) == pytest.approx(0.1)
    assert first(view("a"), view("b", missing=10, work=early)) == pytest.approx(1.62)


def test_decoding_takes_its_share_of_the_device_but_never_all():
    half = Work(tpot_s=0.02)
    assert first(view("a"), view("b", running=1, work=half)) == pytest.approx(0.2)
    much = Work(tpot_s=0.001)
    assert first(view("a"), view("b", running=1, work=much)) == pytest.approx(1.0)


def test_what_was_let_in_since_counts_as_well():
    assert first(view("a"), view("b"), ahead={"a": 100, "b": 100}) == pytest.approx(0.2 + 0.12)


def test_a_model_that_nobody_knows_is_not_judged():
    assert first(view("b", work=waiting(10_000, due_s=0.0))) == 0.0


def test_requests_are_let_in_until_the_next_would_be_late():
    """0.12 s for the first prompt, 0.1 s for each more: the tenth would be 20 ms late."""
    seen = PoolState((view("a"),), costs=COSTS), 5.0
    admission = Admission(lambda: seen)
    answers = [admission.late_by_s("a", prompt_tokens=100, ttft_s=1.0, now=6.0) for _ in range(10)]
    assert answers[:9] == [0.0] * 9
    assert answers[9] == pytest.approx(0.02)
    # A refused one does not count, and those that the loop has seen since count there.
    assert admission.late_by_s("a", prompt_tokens=80, ttft_s=1.0, now=6.0) == 0.0
    seen = PoolState((view("a", work=waiting(300, due_s=7.0)),), costs=COSTS), 6.5
    assert admission.late_by_s("a", prompt_tokens=100, ttft_s=1.0, now=6.6) == 0.0


def test_before_the_first_decision_all_are_let_in():
    assert Admission(lambda: None).late_by_s("a", prompt_tokens=9, ttft_s=1e-9, now=0.0) == 0.0
