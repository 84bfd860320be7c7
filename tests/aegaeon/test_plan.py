"""The pure planner: what is evicted so that a model fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.core.errors import CapacityError
from aegaeon.switching.plan import UnitView, plan_activation

MIB = 1 << 20


def unit(
    model: str,
    tag: str = "weights",
    size: int = 10,
    *,
    mapped: bool = True,
    resident: bool | None = None,
    cost: int | None = None,
    used: float = 0.0,
    pinned: bool = False,
    busy: bool = False,
    needs_host: bool = False,
    holds_host: bool = False,
    order: int = 0,
    shrunk: int | None = None,
    held: int | None = None,
    holds: bool | None = None,
) -> UnitView:
    return UnitView(
        model=model,
        tag=tag,
        size_bytes=size * MIB,
        mapped=mapped,
        resident=mapped if resident is None else resident,
        move_cost_bytes=(size if cost is None else cost) * MIB,
        last_used=used,
        pinned=pinned,
        busy=busy,
        needs_host=needs_host,
        holds_host=holds_host,
        droppable=tag == "kv",
        order=order,
        shrunk_bytes=None if shrunk is None else shrunk * MIB,
        held_bytes=None if held is None else held * MIB,
        holds_bytes=(mapped if resident is None else resident) if holds is None else holds,
    )


def plan(units, target, free, capacity=100, host_fits=lambda evicted, taken: True):
    return plan_activation(
        units,
        target=target,
        free_bytes=free * MIB,
        capacity_bytes=capacity * MIB,
        host_fits=host_fits,
    )


def test_nothing_is_evicted_when_there_is_room():
    result = plan([unit("a"), unit("b", mapped=False)], "b", free=10)
    assert (result.evict, result.bring_in) == ((), (1,))


def test_the_cheapest_to_bring_back_goes_first():
    units = [
        unit("a", "weights", 10),
        unit("a", "kv", 10, cost=0),
        unit("b", "weights", 10, mapped=False),
    ]
    assert plan(units, "b", free=0).evict == (1,)


def test_the_least_recently_used_goes_first_at_equal_cost():
    units = [unit("a", used=3.0), unit("b", used=1.0), unit("c", mapped=False)]
    assert plan(units, "c", free=0).evict == (1,)


def test_a_given_order_comes_before_the_last_use_and_after_the_cost():
    units = [
        unit("a", used=3.0, order=-1),
        unit("b", used=1.0),
        unit("c", used=2.0, cost=0, order=5),
        unit("d", mapped=False),
    ]
    assert plan(units, "d", free=0).evict == (2,)
    del units[2]
    assert plan(units, "d", free=0).evict == (0,)


def test_idle_models_go_before_busy_ones():
    units = [unit("a", cost=0, busy=True), unit("b", cost=20, used=9.0), unit("c", mapped=False)]
    assert plan(units, "c", free=0).evict == (1,)


def test_of_busy_models_the_one_that_had_the_last_turn_goes():
    """They take turns: it waits longest for its next one."""
    units = [
        unit("a", used=1.0, busy=True),
        unit("b", used=3.0, busy=True),
        unit("c", used=2.0, busy=True),
        unit("d", mapped=False, busy=True),
    ]
    assert plan(units, "d", free=0).evict == (1,)


def test_one_model_too_many_is_not_a_switch_every_turn():
    """Six busy models, room for five, in turn: a sixth of the turns may keep what is there."""
    names = "abcdef"
    resident = set(names[:5])
    used = dict.fromkeys(names, 0.0)
    switches = 0
    for turn in range(600):
        target = names[turn % 6]
        units = [unit(name, mapped=name in resident, used=used[name], busy=True) for name in names]
        result = plan(units, target, free=0)
        switches += bool(result.bring_in)
        resident -= {units[index].model for index in result.evict}
        resident.add(target)
        used[target] = turn + 1.0
    assert switches < 150


def test_an_early_small_victim_is_spared_when_a_later_one_suffices():
    units = [
        unit("a", "kv", 2, cost=0),
        unit("b", "weights", 20),
        unit("c", "weights", 20, mapped=False),
    ]
    assert plan(units, "c", free=0).evict == (1,)


def test_pinned_models_are_never_evicted():
    units = [unit("a", size=50, pinned=True), unit("b", size=60, mapped=False)]
    with pytest.raises(CapacityError, match=r"pinned models hold 50 MiB"):
        plan(units, "b", free=50)


def test_a_model_that_cannot_fit_is_refused_with_the_numbers():
    units = [unit("a", "weights", 90, mapped=False), unit("a", "kv", 20, mapped=False)]
    with pytest.raises(CapacityError) as caught:
        plan(units, "a", free=100)
    message = str(caught.value)
    assert "90 MiB weights + 20 MiB kv = 110 MiB" in message
    assert "device_memory is 100 MiB" in message


# -- a host without room -------------------------------------------------------------------------


def fits_after(taken_needed: set[int]):
    """Nothing fits before the host memory of these units has been taken."""
    return lambda evicted, taken: taken_needed <= set(taken)


def test_a_victim_that_the_host_has_no_room_for_is_passed_over():
    units = [
        unit("a", "kv", 10, cost=0, needs_host=True),
        unit("b", "weights", 10, cost=10),
        unit("c", mapped=False),
    ]
    result = plan(units, "c", free=0, host_fits=lambda evicted, taken: False)
    assert (result.evict, result.release, result.drop) == ((1,), (), ())


def test_host_copies_of_what_is_resident_are_given_up_before_anything_is_lost():
    units = [
        unit("a", "kv", 10, needs_host=True, used=5.0),
        unit("b", "kv", 10, pinned=True, holds_host=True, used=1.0),
        unit("d", "kv", 10, mapped=False, holds_host=True, used=0.0),
        unit("c", mapped=False),
    ]
    result = plan(units, "c", free=0, host_fits=fits_after({1}))
    assert (result.evict, result.release, result.drop) == ((0,), (1,), ())


def test_a_victims_own_copies_are_not_taken():
    units = [unit("a", "kv", 10, needs_host=True, holds_host=True), unit("c", mapped=False)]
    seen = []

    def host_fits(evicted, taken):
        seen.append((list(evicted), list(taken)))
        return len(seen) > 1

    result = plan(units, "c", free=0, host_fits=host_fits)
    assert seen == [([0], []), ([0], [])]
    assert (result.evict, result.release, result.drop) == ((0,), (), ())


def test_idle_models_lose_their_kv_before_busy_ones():
    units = [
        unit("a", "kv", 10, needs_host=True, busy=True, used=9.0),
        unit("b", "kv", 10, mapped=False, holds_host=True, busy=True, used=1.0),
        unit("d", "kv", 10, mapped=False, holds_host=True, used=3.0),
        unit("e", "kv", 10, mapped=False, holds_host=True, used=4.0),
        unit("c", mapped=False),
    ]
    assert plan(units, "c", free=0, host_fits=fits_after({2})).drop == (2,)
    assert plan(units, "c", free=0, host_fits=fits_after({3})).drop == (3,)
    assert plan(units, "c", free=0, host_fits=fits_after({1})).drop == (1,)


def test_a_victim_is_dropped_where_it_is_when_nothing_else_helps():
    units = [unit("a", "kv", 10, needs_host=True, busy=True), unit("c", mapped=False)]
    result = plan(units, "c", free=0, host_fits=lambda evicted, taken: False)
    assert (result.evict, result.release, result.drop) == ((0,), (), (0,))


def test_pinned_models_lose_nothing_on_the_host_either():
    units = [
        unit("a", "kv", 10, needs_host=True),
        unit("b", "kv", 10, mapped=False, holds_host=True, pinned=True),
        unit("c", mapped=False),
    ]
    assert plan(units, "c", free=0, host_fits=fits_after({1})).drop == (0,)


def test_memory_that_is_mapped_but_not_valid_is_only_reloaded():
    result = plan([unit("a", mapped=True, resident=False)], "a", free=0)
    assert (result.evict, result.bring_in) == ((), (0,))


@st.composite
def pools(draw):
    units = []
    for index in range(draw(st.integers(1, 6))):
        pinned = draw(st.booleans()) and index > 0
        for tag in ("weights", "kv"):
            size = draw(st.integers(1, 20))
            units.append(
                unit(
                    f"m{index}",
                    tag,
                    size,
                    mapped=draw(st.booleans()),
                    cost=draw(st.integers(0, 40)),
                    used=draw(st.floats(0, 10)),
                    pinned=pinned,
                    needs_host=tag == "kv" and draw(st.booleans()),
                    holds_host=tag == "kv" and draw(st.booleans()),
                )
            )
    return units, draw(st.integers(0, 60)), draw(st.integers(0, 3))


@given(pools())
def test_a_plan_makes_room_for_its_target_and_touches_nobody_it_may_not(pool):
    units, free, host_room = pool

    def host_fits(evicted, taken):
        """Each unit takes one place; what is taken from one makes room for one."""
        taken = [index for index in taken if units[index].holds_host]
        return len(evicted) <= host_room + len(taken)

    missing = sum(u.size_bytes for u in units if u.model == "m0" and not u.mapped)
    evictable = sum(u.size_bytes for u in units if u.mapped and u.model != "m0" and not u.pinned)
    if free * MIB + evictable < missing:
        with pytest.raises(CapacityError):
            plan(units, "m0", free, host_fits=host_fits)
        return
    result = plan(units, "m0", free, host_fits=host_fits)
    saved = [i for i in result.evict if units[i].needs_host and i not in result.drop]
    assert host_fits(saved, [*result.release, *result.drop])
    for index in (*result.release, *result.drop):
        assert units[index].tag == "kv"
        assert index in result.release or (units[index].model != "m0" and not units[index].pinned)
    for index in result.release:
        assert units[index].holds_bytes
    # No drop could have been avoided.
    if host_room >= len(units):
        assert result.release == result.drop == ()
    victims = [units[index] for index in result.evict]
    assert all(u.mapped and u.model != "m0" and not u.pinned for u in victims)
    freed = sum(u.size_bytes for u in victims)
    assert free * MIB + freed >= missing
    # No victim could have been spared.
    assert all(free * MIB + freed - u.size_bytes < missing for u in victims)
    assert [units[index].model for index in result.bring_in] == [
        u.model for u in units if u.model == "m0" and not u.resident
    ]


# -- caches that give back what they do not need ---------------------------------------------------


def test_what_can_be_given_back_is_taken_before_anything_is_evicted():
    units = [
        unit("a", "weights", 10, cost=0),
        unit("a", "kv", 20, shrunk=5),
        unit("b", mapped=False, size=15),
    ]
    result = plan(units, "b", free=0)
    assert (result.shrink, result.evict) == ((1,), ())


def test_when_giving_back_does_not_suffice_something_is_evicted_too():
    units = [
        unit("a", "weights", 10, cost=10),
        unit("a", "kv", 20, cost=10, shrunk=5),
        unit("b", mapped=False, size=25),
    ]
    result = plan(units, "b", free=0)
    # Per byte that it would still free, the cache has become the dearer one.
    assert (result.shrink, result.evict) == ((1,), (0,))


def test_what_is_evicted_is_not_shrunk_first():
    units = [unit("a", "kv", 20, cost=1, shrunk=5), unit("b", mapped=False, size=20)]
    result = plan(units, "b", free=0)
    assert (result.shrink, result.evict) == ((), (0,))


def test_a_shrunk_cache_takes_the_rest_of_its_range():
    a = unit("a", "kv", 20, resident=False, holds=True, held=5)
    result = plan([a, unit("b", size=30)], "a", free=15)
    assert (result.bring_in, result.evict) == ((0,), ())
    assert plan([a, unit("b", size=30)], "a", free=14).evict == (1,)


def shrunk_with_copies() -> list[UnitView]:
    return [
        unit("a", "kv", 20, needs_host=True, busy=True),
        unit("b", "kv", 20, resident=False, holds=True, held=5, holds_host=True, used=1.0),
        unit("c", mapped=False, size=20),
    ]


def test_copies_of_a_shrunk_cache_are_released_before_it_is_dropped():
    result = plan(shrunk_with_copies(), "c", free=0, host_fits=fits_after({1}))
    assert (result.evict, result.release, result.drop) == ((0,), (1,), ())


def test_a_shrunk_cache_that_stays_is_not_dropped_for_another():
    units = shrunk_with_copies()
    units.append(unit("d", "kv", 20, mapped=False, holds_host=True, used=2.0))
    result = plan(units, "c", free=0, host_fits=lambda evicted, taken: {1, 3} <= {*taken})
    assert (result.evict, result.release, result.drop) == ((0,), (1,), (3,))


def test_what_is_mapped_in_part_and_lost_has_no_copies_to_spare():
    units = shrunk_with_copies()
    units[1] = unit("b", "kv", 20, resident=False, held=5, holds_host=True)
    result = plan(units, "c", free=0, host_fits=fits_after({1}))
    assert (result.evict, result.release, result.drop) == ((0,), (), (1,))


sizes = st.integers(0, 20)


@given(
    st.lists(st.tuples(st.integers(1, 20), sizes, sizes, st.booleans(), st.booleans()), max_size=6),
    st.integers(1, 60),
    st.integers(0, 20),
)
def test_a_plan_frees_enough_and_shrinks_no_more_than_it_must(caches, wanted, free):
    units = [
        unit(f"m{i}", "kv", size, cost=cost, shrunk=min(kept, size), busy=busy, pinned=pinned)
        for i, (size, kept, cost, busy, pinned) in enumerate(caches)
    ]
    units.append(unit("target", size=wanted, mapped=False))
    reachable = free + sum(u.size_bytes // MIB for u in units[:-1] if not u.pinned)
    if reachable < wanted:
        with pytest.raises(CapacityError):
            plan(units, "target", free=free)
        return
    result = plan(units, "target", free=free)
    freed = [units[index].size_bytes for index in result.evict]
    spared = [units[index].spare_bytes for index in result.shrink]
    missing = (wanted - free) * MIB
    assert sum(freed) + sum(spared) >= missing
    assert not set(result.evict) & set(result.shrink)
    assert not any(units[index].pinned for index in (*result.evict, *result.shrink))
    assert all(size > 0 for size in spared)
    for size in (*freed, *spared):
        assert sum(freed) + sum(spared) - size < missing, "one is not needed"
