"""Random operations on an arena against a model that is a dictionary of granules.

The model says what must be mapped, what every mapped byte must be, and who owns how much; the
driver's faults are part of the game.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kernel_support import GRANULE, assert_ledger

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

CAPACITY = 24  # in granules, like all numbers below
REGION = 16


class ArenaModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.device = FaultyDevice(ak.Device("host", memory_bytes=CAPACITY * GRANULE))
        self.next_value = 1

    @initialize(handle=st.sampled_from([1, 2, 3, 4, 8]))
    def open(self, handle: int) -> None:
        self.handle = handle
        self.arena = ak.Arena(
            self.device, capacity_bytes=CAPACITY * GRANULE, handle_bytes=handle * GRANULE
        )
        self.regions: dict[str, ak.Region] = {}
        # Per region: granule -> (first granule of its handle, value written there or None).
        self.mapped: dict[str, dict[int, tuple[int, int | None]]] = {}
        for name in "abc":
            self.reserve(name)

    def reserve(self, name: str) -> None:
        self.regions[name] = self.arena.reserve(REGION * GRANULE, owner=name, tag="t")
        self.mapped[name] = {}

    def free(self) -> int:
        return CAPACITY - sum(len(granules) for granules in self.mapped.values())

    def handle_starts(self, begin: int, count: int) -> dict[int, int]:
        """Granule -> first granule of the handle that a map of this range puts there."""
        starts, at = {}, begin
        while at < begin + count:
            size = self.handle if at % self.handle == 0 and begin + count - at >= self.handle else 1
            starts.update({at + i: at for i in range(size)})
            at += size
        return starts

    def expected_unmap(self, name: str, begin: int, count: int) -> bool:
        granules = self.mapped[name]
        wanted = range(begin, begin + count)
        if any(g not in granules for g in wanted):
            return False
        cut_before = begin - 1 in granules and granules[begin - 1][0] == granules[begin][0]
        end = begin + count
        cut_after = end in granules and granules[end][0] == granules[end - 1][0]
        return not (cut_before or cut_after)

    ranges = st.tuples(st.integers(0, REGION - 1), st.integers(1, REGION)).map(
        lambda pair: (pair[0], min(pair[1], REGION - pair[0]))
    )

    @rule(name=st.sampled_from("abc"), span=ranges, fail=st.none() | st.integers(1, 12))
    def map(self, name: str, span: tuple[int, int], fail: int | None) -> None:
        begin, count = span
        taken = any(g in self.mapped[name] for g in range(begin, begin + count))
        self.device.reset()
        if fail:
            self.device.fail_call(fail, code=719)
        try:
            self.regions[name].map(begin * GRANULE, count * GRANULE)
        except ak.LifecycleError:
            assert taken
        except ak.OutOfMemory:
            assert count > self.free()
            assert not taken
        except ak.DriverError:
            assert fail
        else:
            assert not taken
            assert count <= self.free()
            for granule, start in self.handle_starts(begin, count).items():
                self.mapped[name][granule] = (start, None)
        self.device.reset()

    @rule(name=st.sampled_from("abc"), span=ranges, fail=st.none() | st.integers(1, 4))
    def unmap(self, name: str, span: tuple[int, int], fail: int | None) -> None:
        begin, count = span
        possible = self.expected_unmap(name, begin, count)
        self.device.reset()
        if fail:
            self.device.fail_call(fail, code=719)
        try:
            self.regions[name].unmap(begin * GRANULE, count * GRANULE)
        except ak.LifecycleError:
            assert not possible
        except ak.DriverError:
            assert fail
        else:
            assert possible
            for granule in range(begin, begin + count):
                del self.mapped[name][granule]
        self.device.reset()

    @rule(name=st.sampled_from("abc"), fail=st.none() | st.integers(1, 12))
    def unmap_all(self, name: str, fail: int | None) -> None:
        self.device.reset()
        if fail:
            self.device.fail_call(fail, code=719)
        try:
            self.regions[name].unmap()
        except ak.LifecycleError:
            assert not self.mapped[name]
        except ak.DriverError:
            assert fail
        else:
            assert self.mapped[name]
            self.mapped[name] = {}
        self.device.reset()

    @rule(
        gone=st.sampled_from("abc"),
        name=st.sampled_from("abc"),
        span=ranges,
        contents=st.sampled_from(["zero", "poison", "preserve"]),
        fail=st.none() | st.integers(1, 16),
    )
    def evict_and_map(
        self,
        gone: str,
        name: str,
        span: tuple[int, int],
        contents: Literal["zero", "poison", "preserve"],
        fail: int | None,
    ) -> None:
        """One transaction: all that `gone` has makes way for a part of `name`."""
        begin, count = span
        left = {} if gone == name else self.mapped[name]
        taken = any(g in left for g in range(begin, begin + count))
        room = self.free() + len(self.mapped[gone])
        self.device.reset()
        if fail:
            self.device.fail_call(fail, code=719)
        plan = self.arena.transaction()
        plan.unmap(self.regions[gone])
        plan.map(self.regions[name], begin * GRANULE, count * GRANULE, contents=contents)
        try:
            self.arena.commit(plan.steps)
        except ak.LifecycleError:
            assert taken or not self.mapped[gone]
        except ak.OutOfMemory:
            assert count > room
        except ak.DriverError as error:
            assert fail
            self.lose(error)
        else:
            assert self.mapped[gone]
            assert not taken
            assert count <= room
            self.mapped[gone] = {}
            for granule, start in self.handle_starts(begin, count).items():
                value = 0xFF if contents == "poison" else None
                self.mapped[name][granule] = (start, value)
        self.device.reset()

    def lose(self, error: ak.DriverError) -> None:
        """What the error names has lost its bytes, and may be mapped no more."""
        assert not error.quarantined
        for lost in error.lost_contents:
            region = self.regions[lost.owner]
            mapped = {
                g
                for offset, size in region.mapped_ranges()
                for g in range(offset // GRANULE, (offset + size) // GRANULE)
            }
            begin = lost.offset_bytes // GRANULE
            for granule in range(begin, begin + lost.size_bytes // GRANULE):
                if granule in mapped:
                    start, _ = self.mapped[lost.owner][granule]
                    self.mapped[lost.owner][granule] = (start, None)
                else:
                    self.mapped[lost.owner].pop(granule, None)

    @rule(name=st.sampled_from("abc"))
    def write(self, name: str) -> None:
        for granule, (start, _) in self.mapped[name].items():
            value = self.next_value = self.next_value % 255 + 1
            # The ends of every granule: a move of page tables by the wrong length shows there.
            address = self.regions[name].address + granule * GRANULE
            ctypes.memset(address, value, 8)
            ctypes.memset(address + GRANULE - 8, value, 8)
            self.mapped[name][granule] = (start, value)

    @precondition(lambda self: hasattr(self, "regions"))
    @rule(name=st.sampled_from("abc"))
    def reopen(self, name: str) -> None:
        self.regions[name].close()
        self.reserve(name)

    @invariant()
    def contents_and_ledger_hold(self) -> None:
        if not hasattr(self, "arena"):
            return
        stats = assert_ledger(self.arena)
        assert stats.quarantined_bytes == 0
        assert stats.free_bytes == self.free() * GRANULE
        for name, granules in self.mapped.items():
            region = self.regions[name]
            assert region.mapped_bytes == len(granules) * GRANULE
            assert stats.owners.get((name, "t"), 0) == region.mapped_bytes
            for granule, (_, value) in granules.items():
                if value is not None:
                    address = region.address + granule * GRANULE
                    assert ctypes.string_at(address, 8) == bytes([value] * 8)
                    assert ctypes.string_at(address + GRANULE - 8, 8) == bytes([value] * 8)

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.device.reset()
        self.arena.close()
        self.regions.clear()
        if self.device.live:
            gc.collect()
        assert self.device.live == {}


def walk(num_examples: int, num_steps: int) -> None:
    run_state_machine_as_test(
        ArenaModel,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_an_arena_does_what_its_model_says() -> None:
    walk(150, 40)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_an_arena_does_what_its_model_says_for_100_000_steps() -> None:
    walk(1_000, 100)
