"""The host KV store: slots are disjoint, references are counted, slabs come and go."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aegaeon_kernels as ak
from aegaeon.core.errors import CapacityError
from aegaeon.switching.kv_store import (
    FRAME_BYTES,
    MAX_WASTED_SHARE,
    BlockShape,
    HostKVStore,
    frames_per_slab,
)
from aegaeon_kernels.kv_layout import KVLayout, Plane, merged_ranges

KIB = 1 << 10


def make_store(num_frames: int) -> HostKVStore:
    return HostKVStore(ak.HostImage.allocate(num_frames * FRAME_BYTES))


@given(st.integers(1, 20 << 20))
def test_a_slab_wastes_little(slot_bytes):
    slab_bytes = frames_per_slab(slot_bytes) * FRAME_BYTES
    assert slab_bytes >= slot_bytes
    assert slab_bytes % slot_bytes <= MAX_WASTED_SHARE * slab_bytes


def test_slots_of_one_size_are_neighbours():
    slots = make_store(4).allocate(96 * KIB, 5)
    assert np.diff(slots).tolist() == [96 * KIB] * 4


def test_a_slot_is_free_when_its_last_reference_goes():
    store = make_store(1)
    (slot,) = store.allocate(FRAME_BYTES, 1)
    store.hold([slot])
    store.release([slot])
    assert not store.fits([(FRAME_BYTES, 1)])
    store.release([slot])
    assert store.allocate(FRAME_BYTES, 1) == [slot]


def test_an_empty_slab_gives_its_frames_to_other_sizes():
    store = make_store(2)
    slots = store.allocate(64 * KIB, 64)
    assert not store.fits([(96 * KIB, 1)])
    store.release(slots[:32])
    assert store.fits([(96 * KIB, 21)])
    assert not store.fits([(96 * KIB, 22)])
    assert store.fits([(96 * KIB, 42)], released=slots[32:])


def test_what_does_not_fit_is_refused_with_the_numbers_and_takes_nothing():
    store = make_store(2)
    store.allocate(FRAME_BYTES, 1)
    before = store.stats()
    with pytest.raises(CapacityError, match=r"30 KV blocks of 96 KiB .* has 4 MiB, of which 2 MiB"):
        store.allocate(96 * KIB, 30)
    assert store.stats() == before


def test_a_release_that_leaves_a_reference_makes_no_room():
    store = make_store(1)
    slots = store.allocate(FRAME_BYTES, 1)
    store.hold(slots)
    assert not store.fits([(FRAME_BYTES, 1)], released=slots)


SIZES = (4 * KIB, 96 * KIB, 100_000, FRAME_BYTES, 3 << 20)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_random_use_agrees_with_a_simple_model(seed):
    """Slots never overlap, `fits` says what `allocate` does, and the sums are right."""
    rng = random.Random(seed)
    store = make_store(12)
    held: dict[int, tuple[int, int]] = {}  # slot: (bytes, references)
    for _ in range(120):
        size = rng.choice(SIZES)
        action = rng.random()
        if action < 0.5:
            count = rng.randrange(1, 30)
            if store.fits([(size, count)]):
                for slot in store.allocate(size, count):
                    assert slot not in held
                    held[slot] = (size, 1)
            else:
                with pytest.raises(CapacityError):
                    store.allocate(size, count)
        elif held:
            chosen = rng.sample(list(held), min(len(held), rng.randrange(1, 40)))
            if action < 0.6:
                store.hold(chosen)
                held |= {slot: (held[slot][0], held[slot][1] + 1) for slot in chosen}
            else:
                # Releasing makes exactly the room that was foretold.
                foretold = store.fits([(size, 20)], released=chosen)
                store.release(chosen)
                for slot in chosen:
                    held[slot] = (held[slot][0], held[slot][1] - 1)
                    if held[slot][1] == 0:
                        del held[slot]
                assert store.fits([(size, 20)]) is foretold
        ends = sorted((slot, slot + size) for slot, (size, _) in held.items())
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        stats = store.stats()
        assert stats.used_bytes == sum(size for size, _ in held.values())
        assert stats.used_bytes <= stats.slab_bytes <= stats.capacity_bytes
    for slot, (_, references) in held.items():
        store.release([slot] * references)
    assert (store.stats().used_bytes, store.stats().slab_bytes) == (0, 0)


# -- BlockShape -----------------------------------------------------------------------------------

PAGE = 512
LAYERS = 4
BLOCKS = 16
SIZE = LAYERS * BLOCKS * PAGE
LAYOUTS = {
    "layer outermost": [
        KVLayout(
            tuple(Plane(layer * BLOCKS * PAGE, PAGE) for layer in range(LAYERS)),
            PAGE,
            BLOCKS,
            SIZE,
        )
    ],
    "block outermost": [
        KVLayout(
            tuple(Plane(layer * PAGE, LAYERS * PAGE) for layer in range(LAYERS)),
            PAGE,
            BLOCKS,
            SIZE,
        )
    ],
    "groups that overlay each other": [
        KVLayout((Plane(0, 4 * PAGE), Plane(PAGE, 4 * PAGE)), PAGE, BLOCKS, SIZE),
        KVLayout((Plane(0, 4 * PAGE),), 3 * PAGE, BLOCKS, SIZE),
    ],
    "padding between pages": [
        KVLayout((Plane(0, 1024), Plane(700, 1024)), 300, BLOCKS, SIZE),
    ],
}


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_pieces_are_the_bytes_of_the_blocks_packed_one_after_another(layouts):
    rng = random.Random(3)
    shape = BlockShape.of(layouts)
    for _ in range(40):
        blocks = rng.sample(range(BLOCKS), rng.randrange(1, BLOCKS))
        slots = [place * shape.slot_bytes for place in rng.sample(range(64), len(blocks))]
        if rng.random() < 0.3:
            slots.sort()
        pieces = shape.pieces(blocks, slots)
        region = np.zeros(SIZE, np.uint8)
        for offset, _, size in pieces:
            region[offset : offset + size] += 1
        expected = np.zeros(SIZE, np.uint8)
        for offset, size in merged_ranges(layouts, blocks):
            expected[offset : offset + size] = 1
        assert (region == expected).all(), "each byte of each block once, and no other"
        in_slot = {}
        for offset, image_offset, size in pieces:
            in_slot |= {offset + i: image_offset + i for i in range(0, size, 4)}
        for block, slot in zip(blocks, slots, strict=True):
            places = sorted(
                in_slot[byte]
                for start, size in merged_ranges(layouts, [block])
                for byte in range(start, start + size, 4)
            )
            assert places == list(range(slot, slot + shape.slot_bytes, 4))


def test_neighbouring_blocks_with_neighbouring_slots_are_one_piece():
    shape = BlockShape.of(LAYOUTS["block outermost"])
    size = shape.slot_bytes
    assert shape.pieces([5, 3, 4], [3 * size, size, 2 * size]) == [(3 * size, size, 3 * size)]
    assert len(shape.pieces([5, 3, 4], [size, 3 * size, 2 * size])) == 3
