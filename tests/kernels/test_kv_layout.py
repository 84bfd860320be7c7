"""KV layouts as planes: which bytes belong to which blocks, against a byte map."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon_kernels.kv_layout import ByteRange, KVLayout, Plane, merged_ranges


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
