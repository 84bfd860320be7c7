"""KV layouts as planes: which bytes belong to which blocks, against a byte map."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon_kernels.kv_layout import (
    ByteRange,
    KVLayout,
    PageClass,
    Plane,
    block_pages,
    merged_ranges,
    packed_copies,
)


def covered(ranges: list[ByteRange], size: int) -> np.ndarray:
    """True for each byte in a range; fails when ranges overlap or touch."""
    mask = np.zeros(size, dtype=bool)
    end = -1
    for start, length in ranges:
        assert length > 0
        assert start > end, "ranges are ascending and neither overlap nor touch"
        mask[start : start + length] = True
        end = start + length
    return mask


def by_hand(layouts: list[KVLayout], ids: list[int], size: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for layout in layouts:
        for offset, stride in layout.planes:
            for block in ids:
                mask[offset + block * stride : offset + block * stride + layout.block_bytes] = True
    return mask


@st.composite
def layouts_and_ids(draw):
    num_blocks = draw(st.integers(1, 12))
    page = draw(st.sampled_from([1, 3, 8, 64]))
    num_planes = draw(st.integers(1, 4))
    if draw(st.booleans()):  # layer outermost: every plane is contiguous
        planes = [Plane(i * page * num_blocks, page) for i in range(num_planes)]
    else:  # block outermost, with a gap behind each block
        stride = page * num_planes + draw(st.integers(0, 5))
        planes = [Plane(i * page, stride) for i in range(num_planes)]
    size = max(offset + (num_blocks - 1) * stride + page for offset, stride in planes)
    layout = KVLayout(tuple(planes), page, num_blocks, size)
    ids = draw(st.lists(st.integers(0, num_blocks - 1), max_size=20))
    return layout, ids


@given(layouts_and_ids())
def test_ranges_are_exactly_the_bytes_of_the_blocks(case):
    layout, ids = case
    mask = covered(layout.ranges(ids), layout.size_bytes)
    assert np.array_equal(mask, by_hand([layout], ids, layout.size_bytes))


def test_groups_that_overlay_each_other_are_counted_once():
    a = KVLayout((Plane(0, 8), Plane(80, 8)), 8, 10, 160)
    b = KVLayout((Plane(0, 8),), 8, 10, 160)
    assert merged_ranges([a, b], [1, 2]) == [ByteRange(8, 16), ByteRange(88, 16)]


def test_consecutive_blocks_become_one_range():
    layout = KVLayout((Plane(0, 16),), 16, 100, 1600)
    assert layout.ranges([5, 3, 4, 9, 4]) == [ByteRange(48, 48), ByteRange(144, 16)]
    assert layout.bytes_per_block == 16


def test_no_blocks_are_no_ranges():
    assert KVLayout((Plane(0, 1),), 1, 1, 1).ranges([]) == []


def test_offsets_beyond_4_gib_do_not_wrap():
    stride = 1 << 31
    layout = KVLayout((Plane(1 << 33, stride),), stride, 8, 1 << 35)
    assert layout.ranges([7]) == [ByteRange((1 << 33) + 7 * stride, stride)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"planes": ((0, 4),), "block_bytes": 8}, "pages overlap"),
        ({"planes": ((0, 8),), "size_bytes": 79}, "outside the cache"),
        ({"planes": ((-8, 8),)}, "outside the cache"),
        ({"planes": ()}, "needs planes"),
        ({"num_blocks": 0}, "needs planes"),
        ({"planes": ((0, 8), (36, 8)), "num_blocks": 5}, "pages of different blocks overlap"),
    ],
)
def test_an_impossible_layout_is_refused(kwargs, message):
    sound = {"planes": ((0, 8),), "block_bytes": 8, "num_blocks": 10, "size_bytes": 80}
    with pytest.raises(ValueError, match=message):
        KVLayout(**{**sound, **kwargs})


@pytest.mark.parametrize("ids", [[-1], [10], [0, 10]])
def test_a_block_outside_the_cache_is_refused(ids):
    with pytest.raises(ValueError, match="outside a cache of 10 blocks"):
        KVLayout((Plane(0, 8),), 8, 10, 80).ranges(ids)


# -- pages of a block -----------------------------------------------------------------------------


def layout(*planes: tuple[int, int], page: int, blocks: int, size: int = 1 << 20) -> KVLayout:
    return KVLayout(tuple(Plane(*plane) for plane in planes), page, blocks, size)


def test_pages_that_touch_in_every_block_are_one_page() -> None:
    outermost = layout((0, 40), (8, 40), (16, 40), (32, 40), page=8, blocks=9)
    pages = block_pages((outermost,))
    assert pages.classes == (
        PageClass(24, (Plane(0, 40),), (0,)),
        PageClass(8, (Plane(32, 40),), (24,)),
    )
    assert pages.bytes_per_block == 32


def test_pages_that_touch_in_one_block_only_stay_apart() -> None:
    """The last page of one layer and the first of the next."""
    pages = block_pages((layout((0, 8), (16, 8), page=8, blocks=2),))
    assert pages.classes == (PageClass(8, (Plane(0, 8), Plane(16, 8)), (0, 8)),)
    # With a single block the planes may be different tensors.
    assert len(block_pages((layout((0, 8), (8, 8), page=8, blocks=1),)).classes[0].planes) == 2


def test_groups_that_overlay_each_other_are_packed_once() -> None:
    pages = block_pages(
        (
            layout((0, 100), (32, 100), page=32, blocks=5),
            layout((0, 100), (48, 100), page=48, blocks=5),
            layout((0, 100), page=8, blocks=5),
        )
    )
    assert pages.classes == (PageClass(96, (Plane(0, 100),), (0,)),)


def test_a_packed_block_is_in_ascending_order_whatever_the_page_sizes() -> None:
    small = layout((0, 4), (600, 4), page=4, blocks=10)
    large = layout((100, 16), (1000, 16), page=16, blocks=10)
    pages = block_pages((large, small))
    assert pages.classes == (
        PageClass(4, (Plane(0, 4), Plane(600, 4)), (0, 20)),
        PageClass(16, (Plane(100, 16), Plane(1000, 16)), (4, 24)),
    )
    assert pages.bytes_per_block == 40


def test_the_smallest_cache_bounds_the_ids() -> None:
    pages = block_pages((layout((0, 8), page=8, blocks=5), layout((100, 8), page=8, blocks=3)))
    assert pages.num_blocks == 3


@st.composite
def planes_that_may_overlap(draw):
    num_blocks = draw(st.integers(1, 6))
    planes = draw(
        st.lists(
            st.tuples(st.integers(0, 60), st.integers(1, 12), st.integers(1, 12)),
            min_size=1,
            max_size=4,
        )
    )
    # (offset, stride, page), the stride at least a page
    return num_blocks, [(offset, page + more - 1, page) for offset, page, more in planes]


@settings(max_examples=500)
@given(planes_that_may_overlap())
def test_exactly_blocks_that_share_bytes_are_refused(case):
    num_blocks, planes = case
    layouts = tuple(layout((o, s), page=page, blocks=num_blocks) for o, s, page in planes)
    owners: dict[int, set[tuple[int, int]]] = {}
    for offset, stride, page in planes:
        for block in range(num_blocks):
            for byte in range(offset + block * stride, offset + block * stride + page):
                owners.setdefault(byte, set()).add((block, stride))
    # A byte may have one owner, and one distance to the same byte of the next block.
    if any(len(who) > 1 for who in owners.values()):
        with pytest.raises(ValueError, match="pages of different blocks overlap"):
            block_pages(layouts)
        return
    pages = block_pages(layouts)
    for block in range(num_blocks):
        packed = {}
        for page_bytes, page_planes, packed_offsets in pages.classes:
            for (offset, stride), at in zip(page_planes, packed_offsets, strict=True):
                for byte in range(page_bytes):
                    packed[at + byte] = offset + block * stride + byte
        assert sorted(packed) == list(range(pages.bytes_per_block)), "packed without gaps"
        mine = {byte for byte, who in owners.items() if block in {b for b, _ in who}}
        assert sorted(packed.values()) == sorted(mine), "every byte once"


def test_planes_of_different_strides_that_interleave_are_checked_exactly() -> None:
    """Their extents overlap, their pages do not, until one page grows by a byte."""
    narrow = layout((0, 10), page=4, blocks=6)
    block_pages((narrow, layout((4, 20), page=6, blocks=3)))
    with pytest.raises(ValueError, match="4 bytes every 10 from offset 0 on, and 7 bytes every 20"):
        block_pages((narrow, layout((4, 20), page=7, blocks=3)))


# -- copies between a cache and packed slots ------------------------------------------------------


@given(layouts_and_ids(), st.randoms())
def test_packed_copies_are_the_bytes_of_pack(case, random):
    one, ids = case
    slots = random.sample(range(40), len(ids))
    pages = block_pages((one,))
    copies = packed_copies((one,), ids, slots)
    cache = np.arange(one.size_bytes)
    found = np.full(40 * pages.bytes_per_block, -1)
    for source, destination, size in copies.tolist():
        assert (found[destination : destination + size] == -1).all(), "no byte twice"
        found[destination : destination + size] = cache[source : source + size]
    wanted = np.full_like(found, -1)
    for block, slot in zip(ids, slots, strict=True):
        for page_bytes, planes, packed_offsets in pages.classes:
            for (offset, stride), at in zip(planes, packed_offsets, strict=True):
                begin = slot * pages.bytes_per_block + at
                source = offset + block * stride
                wanted[begin : begin + page_bytes] = cache[source : source + page_bytes]
    assert np.array_equal(found, wanted)
    ends = copies[:, :2] + copies[:, 2:]
    continues = (ends[:-1] == copies[1:, :2]).all(axis=1)
    assert not continues.any(), "what continues on both sides is one copy"
    assert (np.diff(copies[:, 1]) > 0).all()


def test_neighbours_in_both_places_are_one_copy() -> None:
    outermost = layout((0, 16), (8, 16), page=8, blocks=100)
    assert packed_copies((outermost,), [5, 6, 7, 3], [2, 3, 4, 0]).tolist() == [
        [48, 0, 16],
        [80, 32, 48],
    ]
    assert packed_copies((outermost,), [], []).shape == (0, 3)


@pytest.mark.parametrize(
    ("ids", "slots", "message"),
    [
        ([1, 2], [0], "2 block ids and 1 slots"),
        ([100], [0], "100..100 are outside a cache of 100 blocks"),
        ([-1], [0], "outside"),
        ([1], [-1], "slots -1..-1 are negative"),
    ],
)
def test_wrong_slots_are_refused(ids, slots, message):
    with pytest.raises(ValueError, match=message):
        packed_copies((layout((0, 8), page=8, blocks=100),), ids, slots)
