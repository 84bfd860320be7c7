"""The open requests of a model: what is kept up to date equals what is counted anew."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.sched.open_requests import OpenRequests
from aegaeon.sched.scheduler import NO_WORK, RequestView, Work


def test_the_next_token_is_due_by_the_schedule_of_the_slo():
    request = RequestView("r", 5.0, 10, tokens_done=4, ttft_s=2.0, tpot_s=0.5)
    assert request.due_s == 5.0 + 2.0 + 4 * 0.5


def test_no_requests_ask_for_nothing():
    requests = OpenRequests()
    assert requests.work is NO_WORK
    requests.add(RequestView("r", 0.0, 10))
    requests.remove("r")
    assert requests.work == NO_WORK
    assert math.isinf(requests.work.first_due_s)


def test_an_open_id_is_refused():
    requests = OpenRequests()
    requests.add(RequestView("r", 0.0, 10))
    with pytest.raises(ValueError, match="already open"):
        requests.add(RequestView("r", 1.0, 10))


def summed_anew(waiting: list[RequestView], decoding: list[RequestView]) -> Work:
    everyone = waiting + decoding
    if not everyone:
        return NO_WORK
    return Work(
        oldest_arrival_s=min(r.arrival_s for r in everyone),
        oldest_waiting_s=min((r.arrival_s for r in waiting), default=math.inf),
        first_due_s=min((r.due_s for r in waiting), default=math.inf),
        next_due_s=min((r.due_s for r in decoding), default=math.inf),
        tpot_s=min(r.tpot_s for r in everyone),
        priority=min(r.priority for r in everyone),
        first_prompt_tokens=waiting[0].prompt_tokens + waiting[0].tokens_done if waiting else 0,
        prefill_tokens=sum(r.prompt_tokens + r.tokens_done for r in waiting),
        context_tokens=sum(r.prompt_tokens + r.tokens_done for r in decoding),
    )


def one_token_more(request: RequestView) -> RequestView:
    return RequestView(
        request.id, request.arrival_s, request.prompt_tokens, request.tokens_done + 1, True,
        request.ttft_s, request.tpot_s, request.priority,
    )  # fmt: skip


@given(st.data())
def test_the_kept_sum_equals_a_new_one(data):
    requests = OpenRequests()
    waiting: list[RequestView] = []
    decoding: list[RequestView] = []
    for serial in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "prefill", "step", "remove", "preempt"]))
        if action == "add":
            waiting.append(
                RequestView(
                    f"r{serial}",
                    float(serial),
                    data.draw(st.integers(1, 100)),
                    ttft_s=data.draw(st.sampled_from([1.0, 2.0, 8.0])),
                    tpot_s=data.draw(st.sampled_from([0.125, 0.25, 0.5])),
                    priority=data.draw(st.integers(-2, 2)),
                )
            )
            requests.add(waiting[-1])
        elif action == "prefill" and waiting:
            decoding.append(one_token_more(waiting.pop(0)))
            requests.prefilled(decoding[-1].id)
        elif action == "step":
            decoding = [one_token_more(r) for r in decoding]
            requests.decoded_all()
        elif action == "remove" and decoding:
            requests.remove(decoding.pop(data.draw(st.integers(0, len(decoding) - 1))).id)
        elif action == "preempt" and decoding:
            waiting.insert(0, decoding.pop())
            requests.preempted(waiting[0].id)
        assert requests.work == summed_anew(waiting, decoding)
        assert (requests.num_waiting, requests.num_decoding) == (len(waiting), len(decoding))
        assert list(requests.waiting_ids) == [r.id for r in waiting]
        assert all(requests.due_s(r.id) == r.due_s for r in waiting + decoding)
