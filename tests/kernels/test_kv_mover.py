"""Blocks to a host image and back: the same bytes by every way, and the best way by measurement."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import GRANULE, MIB
from kv_support import SAMPLES, Sample, block_outermost, layer_outermost
from prefetch_support import SOON, until

import aegaeon_kernels as ak
from aegaeon_kernels.kv_mover import CALIBRATION_BYTES, BlockMover, Path, PathCost, PathRule
from aegaeon_kernels.testing import FaultyDevice


class Place:
    """A cache in a region, staging memory, and a host image."""

    def __init__(self, size_bytes: int, staging_bytes: int = GRANULE) -> None:
        self.device = FaultyDevice(ak.Device("host", memory_bytes=64 * MIB))
        self.arena = ak.Arena(self.device, capacity_bytes=64 * MIB)
        size = -(-size_bytes // GRANULE) * GRANULE
        self.cache = self.arena.reserve(size, owner="cache")
        self.staging = self.arena.reserve(staging_bytes, owner="staging")
        self.cache.map()
        self.staging.map()
        self.image = ak.HostImage.allocate(max(size, CALIBRATION_BYTES), device=self.device)
        self.prefetcher = ak.Prefetcher(self.device)
        self.mover = BlockMover(self.prefetcher, self.staging)

    def bytes(self) -> np.ndarray:
        return self.cache.numpy((self.cache.size_bytes,), "u1")


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    made = Place(CALIBRATION_BYTES)
    yield made
    made.prefetcher.close()
    made.arena.close()


@pytest.mark.parametrize("path", Path)
@pytest.mark.parametrize("name", [n for n, s in SAMPLES.items() if len(s.part_bytes) == 1])
def test_blocks_come_back_by_any_way_whichever_they_went(
    name: str, path: Path, place: Place
) -> None:
    sample = SAMPLES[name]
    random = np.random.default_rng(len(name))
    num_blocks = min(layout.num_blocks for layout in sample.layouts)
    ids = random.permutation(num_blocks)[: max(1, num_blocks // 2)]
    slots = random.permutation(3 * len(ids))[: len(ids)]
    memory = place.bytes()
    memory[:] = random.integers(0, 256, memory.size, dtype=np.uint8)
    before = memory.copy()
    image = place.image.tensor()
    image.fill_(0xA5)
    place.mover.store(place.cache, sample.layouts, ids, place.image, slots, path=path)
    # As kv.pack defines it, and nothing beside it.
    per_block = ak.kv.bytes_per_block(sample.layouts)
    expected = torch.full_like(image, 0xA5)
    packed = torch.empty(len(ids) * per_block, dtype=torch.uint8)
    ak.kv.pack(torch.from_numpy(before), ids, packed, sample.layouts)
    for i, slot in enumerate(slots.tolist()):
        expected[slot * per_block :][:per_block] = packed[i * per_block :][:per_block]
    assert torch.equal(image, expected)
    for back in Path:
        memory[:] = 0xC3
        place.mover.load(place.image, slots, place.cache, sample.layouts, ids, path=back)
        wanted = torch.full((memory.size,), 0xC3, dtype=torch.uint8)
        ak.kv.unpack(packed, wanted, ids, sample.layouts)
        assert np.array_equal(memory, wanted.numpy()), back


@pytest.mark.parametrize("num_ids", [1, 3, 4, 9, 24])
def test_more_blocks_than_the_staging_memory_holds(num_ids: int) -> None:
    sample = block_outermost(128 << 10, 2)
    # Four blocks in each half.
    place = Place(sample.size_bytes, staging_bytes=GRANULE)
    memory = place.bytes()
    random = np.random.default_rng(num_ids)
    memory[:] = random.integers(0, 256, memory.size, dtype=np.uint8)
    before = memory.copy()
    ids, slots = random.permutation(24)[:num_ids], random.permutation(24)[:num_ids]
    place.mover.store(place.cache, sample.layouts, ids, place.image, slots, path=Path.PACKED)
    expected = np.zeros_like(memory)
    for block in ids.tolist():
        one = slice(block * (256 << 10), (block + 1) * (256 << 10))
        expected[one] = before[one]
    memory[:] = 0
    place.mover.load(place.image, slots, place.cache, sample.layouts, ids, path=Path.PACKED)
    assert np.array_equal(memory, expected)
    del memory
    place.prefetcher.close()
    place.arena.close()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("store", [True, False])
def test_an_error_is_raised_when_no_copy_is_on_its_way_any_more(
    store: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel fails while the copy of another batch is held."""
    sample = block_outermost(128 << 10, 2)
    ids = list(range(12))  # three batches of four
    copy_name, kernel_name = ("store", "pack") if store else ("load", "unpack")
    held_copy, num_sound_kernels = (0, 1) if store else (1, 0)
    copy, kernel = getattr(place.prefetcher, copy_name), getattr(ak.kv, kernel_name)
    tickets: list[ak.Ticket] = []
    kernels: list[str] = []
    held = ExitStack()

    def begin_copy(*args: Any, **kwargs: Any) -> ak.Ticket:
        if len(tickets) == held_copy:
            place.device.reset()
            held.enter_context(place.device.holding("event_synchronize"))
        tickets.append(copy(*args, **kwargs))
        return tickets[-1]

    def run_kernel(*args: Any, **kwargs: Any) -> None:
        kernels.append(kernel_name)
        if len(kernels) > num_sound_kernels:
            until(lambda: place.device.calls.get("event_synchronize"))
            raise Stopped
        kernel(*args, **kwargs)

    def move() -> None:
        if store:
            place.mover.store(place.cache, sample.layouts, ids, place.image, ids, path=Path.PACKED)
        else:
            place.mover.load(place.image, ids, place.cache, sample.layouts, ids, path=Path.PACKED)

    monkeypatch.setattr(place.prefetcher, copy_name, begin_copy)
    monkeypatch.setattr(ak.kv, kernel_name, run_kernel)
    with ThreadPoolExecutor(1) as pool, held:
        moved = pool.submit(move)
        until(lambda: len(kernels) > num_sound_kernels)
        with pytest.raises(TimeoutError):
            moved.result(0.05)
        held.close()
        with pytest.raises(Stopped):
            moved.result(SOON)
        del moved  # with the error's frames, and their views of the staging memory
    assert all(ticket.done or ticket.error is not None for ticket in tickets)
    # And all of it can be used again.
    monkeypatch.undo()
    move()


def test_the_cheapest_way_is_chosen() -> None:
    costs = {
        Path.PIECES: PathCost(fixed_s=1e-5, run_s=1e-5, byte_s=1e-10),
        Path.PACKED: PathCost(fixed_s=1e-4, run_s=0.0, byte_s=1.5e-10),
    }
    rule = PathRule(store=costs, load={Path.PIECES: costs[Path.PIECES]})
    assert rule.choose(1, MIB, store=True) is Path.PIECES
    assert rule.choose(1000, MIB, store=True) is Path.PACKED
    assert rule.choose(1000, MIB, store=False) is Path.PIECES
    # Long runs: each pays for its own copy.
    assert rule.choose(100, 1000 * MIB, store=True) is Path.PIECES


def test_without_a_calibration_blocks_go_in_pieces(place: Place) -> None:
    sample = layer_outermost(256, 3)
    path = place.mover.store(place.cache, sample.layouts, [1, 2], place.image, [0, 1])
    assert path is Path.PIECES


def test_calibration_finds_what_costs_most(place: Place) -> None:
    """Thousands of tiny copies cost more than one kernel over them, on any machine."""
    rule = place.mover.calibrate(place.cache, place.image, rounds=9)
    assert rule == place.mover.rule
    assert set(rule.store) == set(rule.load) == set(Path)
    for costs in (rule.store, rule.load):
        for cost in costs.values():
            assert min(cost.fixed_s, cost.run_s, cost.byte_s) >= 0.0
            assert cost.seconds(1, MIB) > 0.0
    # Many times the noise of a busy machine.
    assert rule.choose(1_000_000, 1_000_000, store=True) is not Path.PIECES
    sample: Sample = layer_outermost(64, 100, blocks=400)
    ids = np.arange(0, 400, 2)
    assert (
        place.mover.store(place.cache, sample.layouts, ids, place.image, np.arange(200))
        is not Path.PIECES
    )


def test_wrong_blocks_and_slots_are_refused(place: Place) -> None:
    sample = layer_outermost(256, 3)
    mover, layouts = place.mover, sample.layouts
    with pytest.raises(ValueError, match="a slot is written twice"):
        mover.store(place.cache, layouts, [1, 2], place.image, [5, 5])
    with pytest.raises(ValueError, match="a block is written twice"):
        mover.load(place.image, [1, 2], place.cache, layouts, [5, 5])
    with pytest.raises(ValueError, match="outside the image"):
        mover.store(place.cache, layouts, [1], place.image, [1_000_000])
    with pytest.raises(ValueError, match="outside"):
        mover.store(place.cache, layouts, [24], place.image, [0])
    with pytest.raises(ValueError, match="two equal lists"):
        mover.store(place.cache, layouts, [1, 2], place.image, [0])
    large = block_outermost(2 * MIB, 1, blocks=2)
    with pytest.raises(ValueError, match="half of the staging memory"):
        mover.store(place.cache, large.layouts, [1], place.image, [0], path=Path.PACKED)
    small = ak.HostImage.allocate(GRANULE, device=place.device)
    with pytest.raises(ValueError, match="calibration copies"):
        mover.calibrate(place.cache, small)
