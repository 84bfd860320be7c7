"""The policies on small pools: the paper's numbers, and what each of them promises."""

import os
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.sched.cost import CostModel, Profile
from aegaeon.sched.open_requests import OpenRequests
from aegaeon.sched.policies import POLICIES, make_policy
from aegaeon.sched.policies.paper import (
    MAX_GPSIZE,
    Q_MAX_S,
    BatchedDecoding,
    GroupedPrefill,
    Paper,
    plan_round,
)  # fmt: skip
from aegaeon.sched.policies.slack import Slack
from aegaeon.sched.policies.static import Static
from aegaeon.sched.scheduler import Arrival, ModelView, Phase, PoolState, RequestView, Turn

COSTS = CostModel(default=Profile(0.01, 0.0, 0.0, 0.02, 0.0), link_bytes_per_s=10.0)
WORKLOADS = int(os.environ.get("AEGAEON_TEST_WORKLOADS", "300"))  # 10,000 in a soak


@dataclass
class Pool:
    """One device that holds one model; runs turns to the letter and notes them."""

    policy: object
    sizes: dict[str, int]
    arrivals: list[tuple[float, str, RequestView, int]]  # time, model, request, output tokens
    now: float = 0.0
    resident: str | None = None
    turns: list[tuple[float, Turn]] = field(default_factory=list)
    waits: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.open = {name: OpenRequests() for name in self.sizes}
        self.left: dict[str, int] = {}
        self.last_run: dict[str, float] = {}
        self.since: dict[str, float] = {}
        self.last = None

    def take_in(self) -> tuple[Arrival, ...]:
        arrived = []
        while self.arrivals and self.arrivals[0][0] <= self.now:
            _, model, request, tokens = self.arrivals.pop(0)
            self.open[model].add(request)
            self.left[request.id] = tokens
            arrived.append(Arrival(model, request))
        return tuple(arrived)

    def state(self, arrived: tuple[Arrival, ...]) -> PoolState:
        return PoolState(
            tuple(
                ModelView(
                    name, requests.num_decoding, requests.num_waiting, len(requests) > 0,
                    name == self.resident, work=requests.work, weights_bytes=self.sizes[name],
                    missing_bytes=0 if name == self.resident else self.sizes[name],
                    last_run_s=self.last_run.get(name),
                )
                for name, requests in self.open.items()
            ),
            last=self.last, costs=COSTS, capacity_bytes=sum(self.sizes.values()), arrived=arrived,
        )  # fmt: skip

    def run(self) -> None:
        for _ in range(100_000):
            arrived = self.take_in()
            turn = self.policy.next_turn(self.state(arrived), self.now)
            if turn is None:
                assert not any(len(requests) for requests in self.open.values()), "work is left"
                if not self.arrivals:
                    return
                self.now = self.arrivals[0][0]
                continue
            self.execute(turn)
        raise AssertionError("the work does not end")

    def execute(self, turn: Turn) -> None:
        requests = self.open[turn.model]
        assert len(requests), "a turn for nothing"
        self.turns.append((self.now, turn))
        oldest = max(requests.work.oldest_arrival_s, self.last_run.get(turn.model, 0.0))
        if self.resident != turn.model:
            self.now += COSTS.switch_s(self.sizes[turn.model])
            self.resident = turn.model
        waited = self.now - oldest
        self.waits[turn.model] = max(waited, self.waits.get(turn.model, 0.0))
        started, steps = self.now, 0
        while len(requests) and steps < turn.max_steps:
            if not self.step(requests, turn):
                break
            steps += 1
            if self.now - started >= turn.quota_s:
                break
        assert steps, "a turn that does nothing"
        self.last_run[turn.model], self.last = self.now, turn.model

    def step(self, requests: OpenRequests, turn: Turn) -> bool:
        stepped = []
        if requests.num_decoding and turn.phase is not Phase.PREFILL:
            self.now += COSTS.step_s(turn.model, requests.num_decoding)
            stepped = list(requests.decoding_ids)
            requests.decoded_all()
        if requests.num_waiting and turn.phase is not Phase.DECODE:
            first = next(iter(requests.waiting_ids))
            self.now += COSTS.prefill_s(turn.model, 1)
            requests.prefilled(first)
            stepped.append(first)
        for each in stepped:
            self.left[each] -= 1
            if self.left[each] <= 0:
                requests.remove(each)
        return bool(stepped)


def random_pool(policy, seed: int) -> Pool:
    dice = random.Random(seed)
    sizes = {f"m{i}": dice.choice([1, 3, 10]) for i in range(dice.randint(1, 5))}
    arrivals = sorted(
        (
            (
                at := round(dice.uniform(0, 5), 3),
                dice.choice(list(sizes)),
                RequestView(f"r{i}", at, dice.randint(1, 50), ttft_s=dice.choice([0.5, 2.0, 10.0]),
                            tpot_s=dice.choice([0.02, 0.1]), priority=dice.randint(0, 1)),
                dice.randint(1, 40),
            )
            for i in range(dice.randint(1, 12))
        ),
        key=lambda arrival: (arrival[0], arrival[2].id),
    )  # fmt: skip
    return Pool(policy, sizes, arrivals)


# ---- the paper ---------------------------------------------------------------------------------


def test_the_worked_example_of_the_paper():
    planned = plan_round([0.025] * 3, [0.1] * 3, 3.0, q_max_s=3.0)
    assert planned.alpha == 1.0
    assert planned.quotas_s == (3.0, 3.0, 3.0)
    assert sum(planned.quotas_s) + 3.0 == 12.0
    assert [quota / 0.025 * 0.1 for quota in planned.quotas_s] == pytest.approx([12.0] * 3)
    with_4_s = plan_round([0.025] * 3, [0.1] * 3, 3.0)
    assert with_4_s.alpha == 0.9375
    assert with_4_s.quotas_s == (4.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("switch_s", "batches", "quota_s"),
    [(0.1, 2, 0.06), (0.3, 4, 0.77), (0.65, 4, 1.68), (0.8, 5, 4.0), (1.5, 3, 1.76)],
)
def test_quotas_of_the_published_7b_profile(switch_s, batches, quota_s):
    planned = plan_round([0.1 / 11.1] * batches, [0.1] * batches, switch_s * batches)
    assert planned.quotas_s[0] == pytest.approx(quota_s, abs=0.006)


@given(
    batches=st.lists(
        st.tuples(st.floats(1e-4, 1.0), st.floats(1e-3, 10.0)), min_size=1, max_size=20
    ),
    switch_s=st.floats(0.0, 100.0),
    q_max_s=st.floats(0.01, 10.0),
)
def test_no_quota_exceeds_q_max(batches, switch_s, q_max_s):
    steps, targets = zip(*batches, strict=True)
    planned = plan_round(steps, targets, switch_s, q_max_s=q_max_s)
    assert all(0.0 <= quota <= q_max_s * (1 + 1e-12) for quota in planned.quotas_s)
    assert planned.alpha >= 0.5
    assert 0 < planned.attainment <= 1


def waiting(name: str, number: int) -> ModelView:
    return ModelView(name, 0, number, number > 0, False)


def arrivals_of(models: str) -> tuple[Arrival, ...]:
    return tuple(Arrival(m, RequestView(f"r{i}", i, 1)) for i, m in enumerate(models))


def test_a_group_is_joined_until_it_ever_held_its_limit():
    queue = GroupedPrefill(max_group_size=2)
    models = (waiting("a", 3), waiting("b", 1))
    turn = queue.next_turn(PoolState(models, arrived=arrivals_of("abaa")), 0.0)
    assert turn == Turn("a", max_steps=1, phase=Phase.PREFILL, prefetch=("b",))
    assert [(g.model, g.pending) for g in queue.groups] == [("a", 2), ("b", 1), ("a", 1)]
    # One of the front group has run; the group does not take another one for it.
    queue.next_turn(PoolState((waiting("a", 3), waiting("b", 1)), arrived=arrivals_of("a")), 0.0)
    assert [(g.model, g.pending) for g in queue.groups] == [("a", 2), ("b", 1), ("a", 1)]
    queue.next_turn(PoolState((waiting("a", 2), waiting("b", 1))), 0.0)
    assert [(g.model, g.size, g.pending) for g in queue.groups] == [
        ("a", 2, 1), ("b", 1, 1), ("a", 1, 1),
    ]  # fmt: skip


def test_the_load_of_a_queue_counts_its_prompts_and_switches():
    queue = GroupedPrefill()
    views = tuple(ModelView(n, 0, 2, True, False, weights_bytes=20) for n in "ab")
    state = PoolState(views, costs=COSTS)
    queue.next_turn(state, 0.0)
    assert queue.load_s(views, state) == pytest.approx(2 * (2.0 + 2 * 0.02))
    assert queue.has_room("a")
    assert MAX_GPSIZE == 8


def test_a_round_gives_each_batch_one_turn_of_its_quota():
    def decoding(name: str, arrival: float) -> ModelView:
        requests = OpenRequests()
        requests.add(RequestView(name, arrival, 1, 1, True))
        return ModelView(name, 1, 0, True, False, work=requests.work, weights_bytes=10)

    state = PoolState((decoding("a", 2.0), decoding("b", 1.0), decoding("c", 3.0)), costs=COSTS)
    policy = BatchedDecoding()
    turns = [policy.next_turn(state, 0.0) for _ in range(4)]
    assert [turn.model for turn in turns] == ["b", "a", "c", "b"]
    assert [turn.prefetch for turn in turns[:3]] == [("a",), ("c",), ()]
    planned = plan_round([0.01] * 3, [0.1] * 3, 3.0)
    assert turns[0].quota_s == planned.quotas_s[0] <= Q_MAX_S


# ---- slack -------------------------------------------------------------------------------------


def view(name, *, due=100.0, missing=0, waited=0.0, priority=0, resident=True, last_run=None):
    requests = OpenRequests()
    requests.add(RequestView(name, -waited, 1, 0, True, due + waited, 0.1, priority))
    return ModelView(
        name, 1, 0, True, resident, work=requests.work, weights_bytes=missing or 5,
        missing_bytes=missing, last_run_s=last_run,
    )  # fmt: skip


def choice(*views: ModelView) -> str:
    return Slack().next_turn(PoolState(views, costs=COSTS), 0.0).model


def test_the_least_slack_runs_and_a_switch_uses_slack_up():
    assert choice(view("a", due=30.0), view("b", due=29.0)) == "b"
    # Later due, but a switch of 5 s has to come first.
    assert choice(view("a", due=40.0), view("b", due=44.0, missing=50)) == "b"


def test_who_can_still_be_on_time_runs_before_who_cannot():
    assert choice(view("late", due=-5.0, missing=1), view("a", due=0.1)) == "a"
    assert choice(view("late", due=-5.0, missing=1), view("a", due=90.0)) == "late"


def test_a_late_token_does_not_speak_for_those_that_can_be_on_time():
    requests = OpenRequests()
    for i, due in enumerate((-5.0, 3.0, 50.0)):
        requests.add(RequestView(f"r{i}", due - 1.0, 1, 0, True, 1.0, 0.1))
    mixed = view("mixed")._replace(work=requests.work, num_running=3)
    assert choice(mixed, view("a", due=4.0)) == "mixed"
    assert choice(mixed, view("a", due=2.0)) == "a"


def test_priorities_come_before_slack_and_starvation_before_priorities():
    urgent = view("urgent", due=50.0, priority=-1)
    assert choice(view("a", due=40.0), urgent) == "urgent"
    assert choice(view("starved", due=40.0, waited=21.0), urgent) == "starved"


def test_quotas_shrink_with_the_cost_of_switches():
    quotas = [
        Slack().next_turn(PoolState((view("a", due=50.0), view("b", due=90.0, missing=size)),
                                    costs=COSTS), 0.0).quota_s
        for size in (0, 1, 2, 100)
    ]  # fmt: skip
    assert quotas == sorted(quotas)
    assert quotas[0] == 0.0
    assert quotas[-1] == 4.0


def test_a_switch_is_followed_by_a_turn_at_least_as_long():
    turn = Slack().next_turn(
        PoolState((view("a", due=1.1, missing=10), view("b", due=1.2)), costs=COSTS), 0.0
    )
    assert (turn.model, turn.quota_s) == ("a", pytest.approx(1.19))


def test_victims_are_idle_ones_then_those_with_most_time_and_never_pinned():
    idle = ModelView("idle", 0, 0, False, True)
    pinned = ModelView("pinned", 0, 0, False, True, pinned=True)
    state = PoolState(
        (view("a", due=80.0), idle, pinned, view("b", due=90.0), view("c", due=70.0)), costs=COSTS
    )
    assert Slack().next_turn(state, 0.0).evict_first == ("idle", "b", "a")


# ---- all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_all_work_is_done_and_the_same_again(name):
    for seed in range(WORKLOADS // 10):
        pools = [random_pool(make_policy(name), seed) for _ in range(2)]
        for pool in pools:
            pool.run()
        assert pools[0].turns == pools[1].turns


def test_slack_starves_nobody():
    for seed in range(WORKLOADS):
        pool = random_pool(Slack(max_wait_s=2.0), seed)
        number = len(pool.sizes)
        pool.run()
        switches_s = sum(COSTS.switch_s(size) for size in pool.sizes.values())
        # The wait, the turn under way, and a turn of each other; a step may overrun each.
        bound_s = 2.0 + switches_s + number * (Q_MAX_S + 0.05) + 1.0
        assert all(waited <= bound_s for waited in pool.waits.values()), seed
        assert all(turn.quota_s <= Q_MAX_S for _, turn in pool.turns)


def test_quotas_of_the_paper_stay_below_q_max_on_random_workloads():
    for seed in range(WORKLOADS // 10):
        pool = random_pool(Paper(), seed)
        pool.run()
        decodes = [turn for _, turn in pool.turns if turn.phase is Phase.DECODE]
        assert all(turn.quota_s <= Q_MAX_S for turn in decodes)


def test_request_level_stays_until_the_requests_have_ended():
    policy = make_policy("request-level")
    views = (view("a", waited=1.0), view("b", waited=2.0))
    assert policy.next_turn(PoolState(views), 0.0).model == "b"
    assert policy.next_turn(PoolState(views, last="a"), 0.0).model == "a"


def test_static_refuses_what_does_not_fit():
    state = PoolState(
        (view("a"), view("b")), capacity_bytes=5, costs=COSTS, arrived=arrivals_of("b")
    )
    assert Static().next_turn(state, 0.0) == Turn("a", max_steps=1, refuse=("r0",))


def test_fcfs_runs_the_model_of_the_oldest_request():
    state = PoolState((view("a", waited=1.0), view("b", waited=2.0)))
    assert make_policy("fcfs", quantum=3).next_turn(state, 0.0) == Turn("b", max_steps=3)
