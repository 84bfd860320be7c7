"""The switcher on the host driver: bytes are right after every switch, whatever fails."""

import random
from contextlib import suppress

import pytest
from switcher_support import (
    BLOCK,
    INVALID_VALUE,
    KV,
    LAUNCH_FAILED,
    MIB,
    NUM_BLOCKS,
    OUT_OF_MEMORY,
    PAGE,
    WEIGHTS,
    PatternModel,
    activate_as_the_loop_does,
    assert_every_live_block_is_somewhere,
    assert_ledger_holds,
    make_switcher,
)

import aegaeon_kernels as ak
from aegaeon.core.errors import CapacityError, OrderRefused
from aegaeon.switching.residency import ModelState
from aegaeon.switching.switcher import SwitchFailed, SwitchRecord
from aegaeon_kernels.kv_layout import KVLayout, Plane
from aegaeon_kernels.testing import FaultyDevice


def test_two_models_on_the_memory_of_one_keep_all_their_bytes():
    switcher, models = make_switcher(capacity=WEIGHTS + KV)
    rng = random.Random(1)
    addresses = {m.name: (m.weights.region.address, m.kv.region.address) for m in models}
    for _ in range(60):
        model = rng.choice(models)
        switcher.activate(model.name)
        model.assert_intact()
        model.write(rng.randrange(NUM_BLOCKS), rng.randrange(256))
        if rng.random() < 0.3 and model.contents:
            del model.contents[rng.choice(list(model.contents))]
        assert_ledger_holds(switcher)
        assert_every_live_block_is_somewhere(models)
        assert [m.name for m in models if switcher.is_resident(m.name)] == [model.name]
    assert addresses == {m.name: (m.weights.region.address, m.kv.region.address) for m in models}
    switcher.close()


def test_a_resident_model_is_switched_to_without_a_copy():
    switcher, models = make_switcher(capacity=3 * (WEIGHTS + KV))
    for model in models:
        switcher.activate(model.name)
    before = switcher.totals.bytes_in
    switcher.activate("a")
    assert switcher.records[-1].path == "hot"
    assert (switcher.totals.hot, switcher.totals.bytes_in) == (1, before)


def test_activating_the_current_model_is_no_switch():
    switcher, _ = make_switcher(capacity=WEIGHTS + KV)
    switcher.activate("a")
    records = len(switcher.records)
    switcher.activate("a")
    assert len(switcher.records) == records


def test_only_live_blocks_are_copied():
    switcher, (a, *_) = make_switcher(capacity=WEIGHTS + KV)
    switcher.activate("a")
    a.write(3, 7)
    a.write(4, 8)
    switcher.activate("b")
    assert switcher.records[-1].bytes_out == 2 * 2 * PAGE
    switcher.activate("a")
    assert switcher.records[-1].bytes_in == WEIGHTS + 2 * 2 * PAGE
    a.assert_intact()


def test_only_blocks_that_were_written_since_the_last_time_are_copied_out():
    switcher, (a, *_) = make_switcher(capacity=WEIGHTS + KV)
    switcher.activate("a")
    for block in range(6):
        a.write(block, block)
    switcher.activate("b")
    switcher.activate("a")
    a.write(2, 77)
    a.write(9, 99)
    switcher.activate("b")
    assert switcher.records[-1].bytes_out == 2 * BLOCK
    switcher.activate("a")
    a.assert_intact()
    switcher.activate("b")
    assert switcher.records[-1].bytes_out == 0


def test_a_block_that_changed_hands_is_copied_again():
    """Freed and given to another request between two evictions: same id, other bytes."""
    switcher, (a, *_) = make_switcher(capacity=WEIGHTS + KV)
    switcher.activate("a")
    a.write(4, 44)
    switcher.activate("b")
    switcher.activate("a")
    del a.contents[4]
    a.write(4, 45)
    switcher.activate("b")
    switcher.activate("a")
    a.assert_intact()


def test_a_write_that_nobody_reports_is_noticed():
    """The negative control of the two tests above."""
    switcher, (a, *_) = make_switcher(capacity=WEIGHTS + KV)
    switcher.activate("a")
    a.write(4, 44)
    switcher.activate("b")
    switcher.activate("a")
    a.pages(4).fill_(45)
    a.contents[4] = 45
    switcher.activate("b")
    switcher.activate("a")
    with pytest.raises(AssertionError):
        a.assert_intact()


def test_blocks_of_requests_that_ended_while_away_are_not_brought_back():
    switcher, (a, *_) = make_switcher(capacity=WEIGHTS + KV)
    switcher.activate("a")
    a.write(3, 7)
    a.write(4, 8)
    switcher.activate("b")
    del a.contents[3]
    switcher.activate("a")
    assert switcher.records[-1].bytes_in == WEIGHTS + BLOCK
    assert switcher.kv_store.stats().used_bytes == BLOCK
    a.assert_intact()


# -- a host store without room -------------------------------------------------------------------

STORE = 2 * MIB  # one slab: as many blocks as the KV cache of one model


def fill(model: PatternModel, num_blocks: int) -> None:
    for block in range(num_blocks):
        model.write(block, model.number)


def without_weights(*models: PatternModel) -> None:
    for model in models:
        model.switcher.models[model.name].units.remove(model.weights)
        model.weights.close()


def test_when_the_store_is_full_another_victim_is_chosen():
    switcher, models = make_switcher(capacity=WEIGHTS + 2 * KV, host_kv=STORE)
    a, b, c = models
    without_weights(b, c)
    switcher.activate("c")
    fill(c, 40)
    switcher.activate("b")
    switcher.activate("a")  # c's blocks leave
    switcher.activate("b")
    fill(b, 28)  # idle, so it would go before a, but the store has room for 24
    switcher.is_busy = lambda name: name != "b"
    switcher.activate("c")
    assert b.kv.resident
    assert not a.kv.resident
    assert switcher.totals.dropped_blocks == 0
    for model in (c, b):
        switcher.activate(model.name)
        assert [model.pages(block).unique().item() for block in model.contents] == [
            model.number
        ] * len(model.contents)


def test_copies_of_what_is_on_the_device_make_room_first():
    switcher, models = make_switcher(capacity=WEIGHTS + 2 * KV, host_kv=STORE)
    a, b, c = models
    without_weights(b, c)
    switcher.activate("a")
    fill(a, 24)
    switcher.activate("b")
    switcher.models["b"].pinned = True
    switcher.activate("c")  # a's blocks leave
    switcher.activate("a")  # and come back in place of c's; their copies are kept
    assert a.kv.num_copies == 24
    switcher.models["a"].pinned = True
    switcher.models["b"].pinned = False
    fill(b, 50)
    switcher.activate("c")
    assert b.kv.num_copies == 50
    assert a.kv.num_copies == 0
    assert switcher.totals.dropped_blocks == 0
    a.assert_intact()


def test_as_a_last_resort_idle_kv_is_dropped_and_that_is_told():
    switcher, (a, b, c) = make_switcher(capacity=WEIGHTS + KV, host_kv=STORE)
    switcher.is_busy = lambda name: name != "a"
    switcher.activate("a")
    fill(a, 40)
    switcher.activate("b")
    fill(b, 40)
    switcher.activate("c")  # b leaves; the store has room for 64 blocks, and holds 40 of a
    record = switcher.records[-1]
    assert (record.dropped_blocks, record.recomputed_requests) == (40, 1)
    assert (switcher.totals.dropped_blocks, switcher.totals.recomputed_requests) == (40, 1)
    assert a.contents == {}
    assert len(b.contents) == 40
    switcher.activate("b")
    b.assert_intact()
    switcher.activate("a")
    assert_every_live_block_is_somewhere([a, b, c])


def test_kv_that_no_store_could_hold_is_dropped_where_it_is():
    switcher, (a, _) = make_switcher(capacity=WEIGHTS + 2 * KV, host_kv=STORE, names="ab")
    switcher.add_model("big")
    image = ak.HostImage.allocate(WEIGHTS, device=switcher.arena.device)
    image.seal()
    switcher.add_weights("big", image)
    unit = switcher.add_kv("big", 2 * KV)
    page = 2 * KV
    unit.layouts = (KVLayout((Plane(0, page),), page, 1, page),)
    unit.book = a
    switcher.activate("big")
    a.contents = {0: 1}
    switcher.activate("b")
    assert switcher.totals.dropped_blocks == 1
    assert not unit.resident


def test_kv_that_costs_nothing_to_bring_back_leaves_before_weights():
    switcher, (a, *_) = make_switcher(capacity=2 * WEIGHTS + KV)
    switcher.activate("a")
    switcher.activate("b")
    # a's KV had no live block: evicting it freed enough, and a's weights stayed.
    assert a.weights.resident
    assert not a.kv.resident


def test_states_follow_the_bytes():
    switcher, _ = make_switcher(capacity=WEIGHTS + KV)
    memory = switcher.models["a"]
    assert memory.state is ModelState.HOST
    seen: list[ModelState] = []
    switcher.on_activate = lambda previous, current: seen.append(switcher.models[current].state)
    switcher.activate("a")
    switcher.activate("b")
    assert seen == [ModelState.RESIDENT, ModelState.RESIDENT]
    assert memory.state is ModelState.HOST


def test_hooks_hear_of_every_switch():
    switcher, _ = make_switcher(capacity=WEIGHTS + KV)
    changes: list[tuple[str | None, str]] = []
    records: list[SwitchRecord] = []
    switcher.on_activate = lambda previous, current: changes.append((previous, current))
    switcher.on_switch = records.append
    for name in "aab":
        switcher.activate(name)
    assert changes == [(None, "a"), ("a", "b")]
    assert [(record.model, record.evicted) for record in records] == [("a", ()), ("b", ("a",))]


def test_the_device_is_quiet_before_memory_changes_hands():
    switcher, (a, *_) = make_switcher(capacity=WEIGHTS + KV)
    mapped_then: list[int] = []
    switcher.quiesce = lambda: mapped_then.append(a.weights.mapped_bytes)
    switcher.activate("a")
    switcher.activate("a")
    switcher.activate("b")
    assert mapped_then == [0, WEIGHTS]


def test_a_model_that_cannot_fit_is_refused_and_nothing_moves():
    switcher, _ = make_switcher(capacity=WEIGHTS + KV - 2 * MIB)
    with pytest.raises(CapacityError, match="needs 4 MiB weights \\+ 2 MiB kv"):
        switcher.activate("a")
    assert switcher.arena.stats().owned_bytes == 0
    assert_ledger_holds(switcher)


def test_host_images_beyond_the_host_memory_are_refused_with_the_numbers():
    switcher, _ = make_switcher(capacity=WEIGHTS + KV, names="a")
    switcher.host_memory_bytes = WEIGHTS + 8 * MIB + 3 * MIB
    switcher.add_model("b")
    image = ak.HostImage.allocate(WEIGHTS, device=switcher.arena.device)
    with pytest.raises(
        CapacityError, match=r"needs 4 MiB, host_memory is 15 MiB, of which 12 MiB .*, 8 MiB by"
    ):
        switcher.add_weights("b", image)
    assert switcher.models["b"].units == []


def test_a_pinned_model_stays():
    switcher, _ = make_switcher(capacity=WEIGHTS + KV)
    switcher.models["a"].pinned = True
    switcher.activate("a")
    with pytest.raises(CapacityError, match="pinned"):
        switcher.activate("b")
    assert switcher.is_resident("a")


def test_removing_a_model_gives_everything_back():
    switcher, _ = make_switcher(capacity=WEIGHTS + KV)
    switcher.activate("a")
    switcher.remove_model("a")
    stats = switcher.arena.stats()
    assert stats.free_bytes == stats.capacity_bytes
    assert "a" not in switcher.models
    switcher.activate("b")


def test_the_device_is_quiet_before_a_model_loses_its_memory():
    switcher, (a, b, _) = make_switcher(capacity=2 * (WEIGHTS + KV))
    switcher.activate("a")
    switcher.activate("b")
    mapped_then: list[tuple[int, int]] = []
    switcher.quiesce = lambda: mapped_then.append((a.kv.mapped_bytes, b.kv.mapped_bytes))
    switcher.abandon("a")
    switcher.remove_model("b")
    assert mapped_then == [(KV, KV), (0, KV)]
    switcher.remove_model("a")  # it has nothing on the device
    assert len(mapped_then) == 2


def never_quiet() -> None:
    raise RuntimeError("an illegal memory access was encountered")


def test_a_model_that_is_given_up_keeps_its_memory_while_the_device_may_use_it(caplog):
    switcher, (a, b, _) = make_switcher(capacity=WEIGHTS + KV)
    switcher.activate("a")
    a.write(1, 1)
    switcher.quiesce = never_quiet
    switcher.abandon("a")
    assert "an illegal memory access" in caplog.text
    assert (a.weights.mapped_bytes, a.kv.mapped_bytes) == (WEIGHTS, KV)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        switcher.remove_model("a")
    assert (a.weights.mapped_bytes, a.kv.mapped_bytes) == (WEIGHTS, KV)
    switcher.quiesce = lambda: None
    switcher.activate("b")
    b.assert_intact()
    assert switcher.totals.bytes_out == 0
    switcher.remove_model("a")
    assert_ledger_holds(switcher)


def test_a_model_out_of_service_is_not_brought_in():
    switcher, (a, *_) = make_switcher(capacity=WEIGHTS + KV)
    switcher.abandon("a")
    switcher.activate("b")
    with pytest.raises(OrderRefused, match="'a' is out of service"):
        switcher.activate("a")
    assert not switcher.prefetch("a")
    assert switcher.is_resident("b")
    assert switcher.current == "b"
    assert (a.weights.mapped_bytes, a.kv.mapped_bytes) == (0, 0)
    # Nor when it could not be unmapped.
    switcher.quiesce = never_quiet
    switcher.abandon("b")
    with pytest.raises(OrderRefused, match="'b' is out of service"):
        switcher.activate("b")


def test_a_second_model_of_one_name_is_refused():
    switcher, _ = make_switcher(capacity=WEIGHTS + KV)
    with pytest.raises(ValueError, match="already here"):
        switcher.add_model("a")


def with_one_failing_call(n: int, *, code: int, persistent: bool) -> tuple[FaultyDevice, bool]:
    """A switch from `a` to `b`, both with live blocks, whose n-th driver call fails; then several
    more switches with a sound driver. Returns the device, and whether a call failed at all.
    """
    switcher, (a, b, _) = make_switcher(capacity=WEIGHTS + KV, faulty=True)
    device = switcher.arena.device
    assert isinstance(device, FaultyDevice)
    switcher.activate("b")
    b.write(9, 99)
    switcher.activate("a")
    a.write(5, 54)
    switcher.activate("b")
    switcher.activate("a")
    a.write(5, 55)  # its copy is out of date
    a.write(40, 66)
    live = device.live
    device.reset()
    device.fail_call(n, code=code, persistent=persistent)
    try:
        switcher.activate("b")
    except SwitchFailed:
        failed = True
    else:
        failed = False
    fired = device.num_calls >= n
    assert failed == fired, f"call {n} failed without a word, or a word came without a failure"
    assert_ledger_holds(switcher)
    if not persistent or not failed:
        device.reset()
    if failed and not persistent:
        assert switcher.current == "a"
        assert switcher.is_resident("a")
        a.assert_intact()
        assert device.live == live
    if failed and persistent:
        for name in "bab":
            # Nothing works; what is resident by luck may be activated. Never another exception.
            with suppress(SwitchFailed, CapacityError):
                switcher.activate(name)
            assert_ledger_holds(switcher)
        device.reset()
    for model in (b, a, b):
        activate_as_the_loop_does(switcher, model.name, tries=5 if persistent else 1)
        model.assert_intact()
        assert_ledger_holds(switcher)
    assert switcher.arena.stats().quarantined_bytes == 0
    assert_every_live_block_is_somewhere([a, b])
    switcher.close()
    switcher.kv_store.image = None  # type: ignore[assignment]
    return device, failed


def fail_each_call(*, code: int, persistent: bool) -> int:
    """The number of driver calls of the switch; each has failed once, and left nothing behind."""
    n = 0
    failed = True
    while failed:
        n += 1
        device, failed = with_one_failing_call(n, code=code, persistent=persistent)
        assert device.live == {}, f"call {n}"
    return n - 1


@pytest.mark.parametrize("code", [INVALID_VALUE, OUT_OF_MEMORY, LAUNCH_FAILED])
def test_when_any_one_driver_call_of_a_switch_fails_everything_is_as_before(code):
    assert fail_each_call(code=code, persistent=False) > 15


def test_when_the_driver_fails_for_good_nothing_is_lost():
    """Not even the way back works; the bytes are in the host images, and return with the driver."""
    assert fail_each_call(code=LAUNCH_FAILED, persistent=True) > 15


@pytest.mark.parametrize("persistent", [False, True])
def test_when_any_one_driver_call_of_an_eviction_fails_nothing_is_lost(persistent):
    n = 0
    fired = True
    while fired:
        n += 1
        switcher, (a, b, _) = make_switcher(capacity=WEIGHTS + KV, faulty=True)
        device = switcher.arena.device
        assert isinstance(device, FaultyDevice)
        switcher.activate("a")
        a.write(5, 54)
        device.reset()
        device.fail_call(n, code=LAUNCH_FAILED, persistent=persistent)
        try:
            switcher.evict("a")
        except SwitchFailed:
            failed = True
        else:
            failed = False
        fired = device.num_calls >= n
        assert failed == fired, n
        assert_ledger_holds(switcher)
        if failed and not persistent:
            assert switcher.is_resident("a")
            a.assert_intact()
        device.reset()
        for model in (b, a):
            activate_as_the_loop_does(switcher, model.name, tries=5)
            model.assert_intact()
        assert_every_live_block_is_somewhere([a, b])
        switcher.close()
    assert n > 3
