"""How long idle models stay on the device."""

from aegaeon.sched.keep_alive import LOOK_INTERVAL_S, KeepAlive
from aegaeon.sched.scheduler import ModelView, PoolState


def state(resident: str, busy: str = "") -> PoolState:
    return PoolState(
        tuple(ModelView(name, 0, 0, name in busy, name in resident) for name in "abcd")
    )


def test_a_model_is_overdue_once_it_has_been_idle_for_its_time():
    keep_alive = KeepAlive({"a": 10.0, "b": 20.0, "c": None})
    assert keep_alive.overdue(state("abcd"), 100.0) == []
    assert keep_alive.overdue(state("abcd"), 109.0) == []
    assert keep_alive.overdue(state("abcd"), 110.0) == ["a"]
    assert keep_alive.overdue(state("bcd"), 120.0) == ["b"]
    assert keep_alive.overdue(state("cd"), 1e6) == []  # for ever, and not known


def test_work_and_absence_begin_the_time_anew():
    keep_alive = KeepAlive({"a": 10.0, "b": 10.0})
    keep_alive.overdue(state("ab"), 0.0)
    keep_alive.overdue(state("a", busy="a"), 5.0)
    assert keep_alive.overdue(state("ab"), 11.0) == []
    assert keep_alive.overdue(state("ab"), 20.9) == []
    assert keep_alive.overdue(state("ab"), 21.4) == ["a", "b"]


def test_what_stays_nevertheless_is_not_asked_at_every_turn():
    keep_alive = KeepAlive({"a": 10.0})
    found = [keep_alive.overdue(state("a"), float(now)) for now in range(100)]
    assert [now for now, names in enumerate(found) if names] == [*range(10, 100, 10)]


def test_a_limit_of_zero_ends_the_stay_at_the_next_look():
    keep_alive = KeepAlive({"a": 0.0})
    assert keep_alive.overdue(state("a"), 1.0) == ["a"]
    assert keep_alive.overdue(state("a"), 1.0 + LOOK_INTERVAL_S / 2) == []
    keep_alive.limits_s["a"] = 5.0  # changed while it is served
    assert keep_alive.overdue(state("a"), 2.0) == []
