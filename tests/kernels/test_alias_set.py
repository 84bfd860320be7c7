"""Alias sets: one slot at several addresses, given from owner to owner without a driver call."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import pytest
from kernel_support import GRANULE, DeviceBytes, assert_ledger, pattern, run_program

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

SLOT = 5 * GRANULE
OWNERS = ("a", "b", "c")


@pytest.fixture
def arena(device: FaultyDevice) -> Iterator[ak.Arena]:
    arena = ak.Arena(device, capacity_bytes=3 * SLOT, handle_bytes=2 * GRANULE)
    yield arena
    device.reset()
    arena.close()


def held(arena: ak.Arena) -> dict[tuple[str, str], int]:
    return dict(assert_ledger(arena).owners)


def test_giving_the_slot_makes_no_driver_call(
    arena: ak.Arena, device: FaultyDevice, device_bytes: DeviceBytes
) -> None:
    with arena.alias_set(SLOT, owners=OWNERS, tag="weights") as slots:
        regions = {owner: slots.region(owner) for owner in OWNERS}
        assert len({region.address for region in regions.values()}) == 3
        assert slots.owner == "a"
        data = pattern(SLOT, seed=1)
        device_bytes.write(regions["a"].address, data)
        before = {owner: region.generation for owner, region in regions.items()}
        device.reset()
        for owner in ("b", "c", "c", "a", "c"):
            slots.give(owner, contents="preserve")
            assert slots.owner == owner
            assert held(arena) == {(owner, "weights"): SLOT}
        assert device.num_calls == 0
        assert before == {owner: region.generation for owner, region in regions.items()}
        for region in regions.values():  # at all addresses at once
            assert (device_bytes.read(region.address, SLOT) == data).all()
    assert held(arena) == {}


@pytest.mark.parametrize("debug", [False, True])
def test_nobody_sees_another_owners_bytes_unless_asked(
    arena: ak.Arena, device_bytes: DeviceBytes, debug: bool
) -> None:
    other = arena.reserve(SLOT, owner="before")
    other.map()
    device_bytes.fill(other.address, 9, SLOT)
    other.close()
    with arena.alias_set(SLOT, owners=OWNERS, debug=debug) as slots:
        for owner in ("a", "b", "c", "a", "b"):
            slots.give(owner)
            region = slots.region(owner)
            assert (device_bytes.read(region.address, SLOT) == 0).all()
            device_bytes.fill(region.address, 7, SLOT)
        slots.give("c", contents="poison")
        assert (device_bytes.read(slots.region("c").address, SLOT) == 0xFF).all()
    other = arena.reserve(3 * SLOT, owner="after")
    other.map()
    assert (device_bytes.read(other.address, 3 * SLOT) == 0).all()
    other.close()


def test_only_the_owner_is_transferred_to(arena: ak.Arena) -> None:
    with arena.alias_set(SLOT, owners=OWNERS) as slots:
        slots.region("a").copy_from(b"abc")
        with pytest.raises(ak.LifecycleError, match="another owner"):
            slots.region("b").copy_from(b"abc")
        slots.give("b", contents="preserve")
        slots.region("b").copy_from(b"xyz")
        for copy in (slots.region("a").copy_from, slots.region("a").copy_to):
            with pytest.raises(ak.LifecycleError, match="another owner"):
                copy(bytearray(3))


@pytest.mark.parametrize("debug", [False, True])
def test_what_the_set_does_nobody_else_may(arena: ak.Arena, debug: bool) -> None:
    with pytest.raises(ValueError, match="once"):
        arena.alias_set(SLOT, owners=["a", "a"])
    with pytest.raises(ValueError, match="at least one"):
        arena.alias_set(SLOT, owners=[])
    with pytest.raises(ValueError, match="granularity"):
        arena.alias_set(SLOT + 1, owners=["a"])
    with arena.alias_set(SLOT, owners=OWNERS, debug=debug) as slots:
        for owner in OWNERS:
            region = slots.region(owner)
            for refused in (region.map, region.unmap, region.close, region.protect):
                with pytest.raises(ak.LifecycleError, match="alias set"):
                    refused()
        with pytest.raises(ak.LifecycleError, match=r"1 alias set\(s\)"):
            arena.close()
        with pytest.raises(ValueError, match="none of the owners of this alias set: a, b, c"):
            slots.give("d")
    slots.close()
    assert slots.region("a").closed
    with pytest.raises(ak.LifecycleError, match="closed"):
        slots.give("b")


@pytest.mark.parametrize("debug", [False, True])
def test_a_held_owner_keeps_the_slot(
    arena: ak.Arena, device_bytes: DeviceBytes, debug: bool
) -> None:
    with arena.alias_set(SLOT, owners=OWNERS, debug=debug) as slots:
        device_bytes.fill(slots.region("a").address, 5, SLOT)
        with slots.region("a").hold("a graph"):
            for refused in (lambda: slots.give("b"), slots.close):
                with pytest.raises(ak.LifecycleError, match="a graph"):
                    refused()
        arena.set_limit("b", max_bytes=GRANULE)
        with pytest.raises(ak.OutOfMemory, match="'b'") as caught:
            slots.give("b")
        assert caught.value.shortage is not None
        assert caught.value.shortage.reason == "owner_maximum"
        assert slots.owner == "a"
        assert held(arena) == {("a", ""): SLOT}
        assert (device_bytes.read(slots.region("a").address, SLOT) == 5).all()
        slots.give("c")
        assert slots.owner == "c"


def test_giving_waits_for_what_the_owner_has_recorded(
    arena: ak.Arena, device: FaultyDevice
) -> None:
    code, stream = device._driver.stream_create()
    assert code == 0
    with arena.alias_set(SLOT, owners=OWNERS) as slots:
        slots.region("a").record(stream)
        device.reset()
        slots.give("b", contents="preserve")
        slots.give("c", contents="preserve")
        assert device.calls == {"event_synchronize": 1}
    assert device._driver.stream_destroy(stream) == 0


def fail_each_call_of_making_one(arena: ak.Arena, device: FaultyDevice, **how: bool) -> None:
    debug, persistent = how["debug"], how["persistent"]
    for n in range(1, 100):
        device.reset()
        device.fail_call(n, persistent=persistent)
        try:
            slots = arena.alias_set(SLOT, owners=OWNERS, debug=debug)
        except ak.DriverError:
            device.reset()
            assert assert_ledger(arena).owned_bytes == 0
            healed = arena.reserve(3 * SLOT, owner="x")  # heals what is in quarantine
            healed.map()
            healed.close()
            assert assert_ledger(arena).free_bytes == 3 * SLOT
            continue
        break
    else:
        pytest.fail("it never succeeded")
    device.reset()
    assert n > 8
    slots.close()
    assert "mappings" not in device.live


@pytest.mark.parametrize("debug", [False, True])
def test_every_failure_of_making_one_leaves_nothing(
    device: FaultyDevice, arena: ak.Arena, debug: bool
) -> None:
    fail_each_call_of_making_one(arena, device, debug=debug, persistent=False)
    assert "reservations" not in device.live


@pytest.mark.parametrize("debug", [False, True])
def test_a_driver_that_fails_for_long_while_one_is_made_costs_nothing(
    host: FaultyDevice, debug: bool
) -> None:
    arena = ak.Arena(host, capacity_bytes=3 * SLOT, handle_bytes=2 * GRANULE)
    fail_each_call_of_making_one(arena, host, debug=debug, persistent=True)
    assert host.live.keys() <= {"handles", "streams"}
    arena.close()
    assert host.live == {}


@pytest.mark.parametrize("debug", [False, True])
def test_every_failure_of_giving_changes_nothing_or_says_so(
    device: FaultyDevice, arena: ak.Arena, device_bytes: DeviceBytes, debug: bool
) -> None:
    slots = arena.alias_set(SLOT, owners=OWNERS, debug=debug)
    data = pattern(SLOT, seed=2)
    for n in range(1, 50):
        address = slots.region("a").address
        device_bytes.write(address, data)
        device.reset()
        device.fail_call(n)
        try:
            slots.give("b")
        except ak.DriverError as error:
            device.reset()
            assert slots.owner == "a"
            assert held(arena) == {("a", ""): SLOT}
            if not error.lost_contents:
                assert (device_bytes.read(address, SLOT) == data).all()
            continue
        break
    else:
        pytest.fail("it never succeeded")
    device.reset()
    assert n > 1
    assert slots.owner == "b"
    slots.close()


@pytest.mark.parametrize("debug", [False, True])
def test_a_failed_close_is_closed_again(device: FaultyDevice, arena: ak.Arena, debug: bool) -> None:
    slots = arena.alias_set(SLOT, owners=OWNERS, debug=debug)
    failures = 0
    for n in range(1, 50):
        device.reset()
        device.fail_call(n)
        try:
            slots.close()
        except ak.DriverError:
            assert_ledger(arena)
            failures += 1
            continue
        break
    assert failures > 1
    assert held(arena) == {}
    assert "mappings" not in device.live


def test_a_view_of_a_region_keeps_the_whole_set(host: FaultyDevice) -> None:
    arena = ak.Arena(host, capacity_bytes=SLOT)
    slots = arena.alias_set(SLOT, owners=OWNERS)
    view = slots.region("b").numpy((SLOT,), np.uint8)
    with pytest.raises(ak.LifecycleError, match=r"1 view\(s\)"):
        slots.close()
    slots.give("b", contents="preserve")
    del slots
    view[:] = 3
    assert held(arena) == {("b", ""): SLOT}
    del view
    assert held(arena) == {}
    arena.close()
    assert host.live == {}


def test_hooks_hear_of_a_close_before_it(host: FaultyDevice) -> None:
    heard: list[tuple[str, int, int]] = []
    arena = ak.Arena(host, capacity_bytes=SLOT)
    slots = arena.alias_set(SLOT, owners=OWNERS)
    for owner in OWNERS:
        slots.region(owner).add_hooks(
            before_unmap=lambda region, offset, size: heard.append((region.owner, offset, size))
        )
    slots.give("b")
    assert heard == []
    slots.close()
    assert sorted(heard) == [(owner, 0, SLOT) for owner in OWNERS]
    arena.close()
    assert host.live == {}


PROGRAM = """
import ctypes, sys
import aegaeon_kernels as ak
device = ak.Device("host", memory_bytes=64 << 20)
arena = ak.Arena(device, capacity_bytes=32 << 20)
slots = arena.alias_set(4 << 20, owners=["a", "b"], debug=sys.argv[1] == "debug")
a, b = slots.region("a").address, slots.region("b").address
ctypes.memset(a, 1, 1)
slots.give("b")
ctypes.memset(b, 1, 1)
print("about to stray", flush=True)
ctypes.string_at(a, 1)
print("it was there")
"""


def test_a_stray_read_is_a_fault_in_debug_mode() -> None:
    result = run_program(PROGRAM, "debug")
    assert (result.stdout, result.returncode) == ("about to stray\n", -signal.SIGSEGV)
    result = run_program(PROGRAM, "")
    assert (result.stdout, result.returncode) == ("about to stray\nit was there\n", 0)
