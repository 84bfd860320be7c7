"""Plans of block moves: complete, free of hazards, and with the fewest moves possible."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon_kernels.kv import plan_compaction, plan_waves
from aegaeon_kernels.kv_compact import Moves, MoveWaves
from aegaeon_kernels.kv_layout import KVLayout, Plane, unused_ranges

# -- compaction -----------------------------------------------------------------------------------


def check_compaction(
    live: np.ndarray, num_blocks: int, pinned: Sequence[int] = (), end_block: int | None = None
) -> Moves:
    """live: ids. Follows the moves on a map of contents; returns them."""
    moves = plan_compaction(live, pinned_block_ids=pinned, end_block=end_block)
    end = end_block
    if end is None:
        end = max([len({*live.tolist(), *pinned}), *(block + 1 for block in pinned)])
    sources, destinations = moves.src_ids.tolist(), moves.dst_ids.tolist()
    before = {block: f"content {block}" for block in live.tolist()}
    after = dict(before)
    assert len(sources) == len(destinations) == len(set(sources)) == len(set(destinations))
    assert not set(sources) & set(destinations), "the moves of one launch have no order"
    for source, destination in zip(sources, destinations, strict=True):
        assert source in before
        assert destination not in before
        assert source not in pinned
        assert destination not in pinned
        assert 0 <= destination < end <= source
        after[destination] = after.pop(source)
    assert sorted(after.values()) == sorted(before.values())
    assert all(block < end for block in after)
    assert sources == sorted(sources)
    assert destinations == sorted(destinations)
    # No block that may stay moves, so there are no fewer moves.
    assert len(sources) == sum(1 for block in before if block >= end)
    return moves


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("seed", range(50))
def test_compaction_of_random_occupancies(num_blocks: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    live = np.flatnonzero(random.random(num_blocks) < random.random())
    random.shuffle(live)
    check_compaction(live, num_blocks)
    if num_blocks:
        pinned = random.choice(num_blocks, random.integers(0, num_blocks // 4 + 1), replace=False)
        check_compaction(live, num_blocks, pinned.tolist())
        lowest = max([len({*live.tolist(), *pinned.tolist()}), *(pinned + 1).tolist()])
        end = int(random.integers(lowest, num_blocks + 2))
        check_compaction(live, num_blocks, pinned.tolist(), end)


@settings(deadline=None)
@given(st.sets(st.integers(0, 300)), st.sets(st.integers(0, 300), max_size=5), st.integers(0, 50))
def test_compaction_of_any_occupancy(live: set[int], pinned: set[int], more: int) -> None:
    lowest = max([len(live | pinned), *(block + 1 for block in pinned)])
    order = np.array(list(live), dtype=np.int64)
    check_compaction(order, 301, sorted(pinned))
    check_compaction(order, 301, sorted(pinned), lowest + more)


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 30), st.integers(1, 20)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 12),
    st.integers(1, 64),
)
def test_what_blocks_leave_free_is_all_that_they_leave_free(
    rows: list[tuple[int, int, int]], num_blocks: int, alignment: int
) -> None:
    """Against a map of the bytes; layouts one by one, as caches that share an allocation have."""
    size = 1024
    layouts = [KVLayout((Plane(offset, page + gap),), page, 16, size) for offset, gap, page in rows]
    used = np.zeros(size, dtype=bool)
    for layout in layouts:
        ((offset, stride),) = layout.planes
        used[offset : offset + (num_blocks - 1) * stride + layout.block_bytes] = True
    found = unused_ranges(layouts, num_blocks, size_bytes=size, alignment_bytes=alignment)
    free = np.zeros(size, dtype=bool)
    for begin, length in found:
        assert begin % alignment == 0
        assert (begin + length) % alignment == 0 or begin + length == size
        assert not free[begin - 1 : begin].any(), "neighbours are one range"
        free[begin : begin + length] = True
    cuts = [*range(0, size, alignment), size]
    expected = np.zeros(size, dtype=bool)
    for begin, end in itertools.pairwise(cuts):
        expected[begin:end] = not used[begin:end].any()
    assert np.array_equal(free, expected)


def fewest_moves(live: frozenset[int], pinned: frozenset[int], end: int) -> int:
    """By breadth-first search over all single moves below the largest id."""
    queue = deque([(live, 0)])
    seen = {live}
    highest = max([end - 1, *live])
    while queue:
        state, count = queue.popleft()
        if all(block < end for block in state):
            return count
        for source in state - pinned:
            for destination in set(range(highest + 1)) - state - pinned:
                following = (state - {source}) | {destination}
                if following not in seen:
                    seen.add(following)
                    queue.append((following, count + 1))
    raise AssertionError("no moves reach the end")


@pytest.mark.parametrize("num_blocks", range(1, 7))
def test_no_plan_has_fewer_moves(num_blocks: int) -> None:
    """Every occupancy and every single pinned block, against all sequences of moves."""
    for bits in range(2**num_blocks):
        live = [block for block in range(num_blocks) if bits >> block & 1]
        for pinned in ([], *([block] for block in range(num_blocks))):
            moves = check_compaction(np.array(live, dtype=np.int64), num_blocks, pinned)
            end = max([len({*live, *pinned}), *(block + 1 for block in pinned)])
            assert len(moves.src_ids) == fewest_moves(frozenset(live), frozenset(pinned), end)


def test_a_lower_end_is_impossible() -> None:
    """The smallest end that the plan chooses is the smallest that it would accept."""
    for live, pinned, lowest in (([5, 9, 2], [], 3), ([5, 9, 2], [7], 8), ([], [3], 4)):
        assert plan_compaction(live, pinned_block_ids=pinned, end_block=lowest)
        with pytest.raises(ValueError, match=f"the lowest possible is {lowest}"):
            plan_compaction(live, pinned_block_ids=pinned, end_block=lowest - 1)


def test_neighbours_stay_neighbours() -> None:
    moves = plan_compaction([0, 1, 6, 100, 101, 102, 103])
    assert moves.src_ids.tolist() == [100, 101, 102, 103]
    assert moves.dst_ids.tolist() == [2, 3, 4, 5]


def test_pinned_blocks_need_not_be_live() -> None:
    """vLLM's null block belongs to nobody, and must not be overwritten."""
    moves = plan_compaction([3, 4], pinned_block_ids=[0])
    assert moves.src_ids.tolist() == [3, 4]
    assert moves.dst_ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("live", "pinned", "message"),
    [
        ([1, 2, 1], [], "live_block_ids names block 1 more than once"),
        ([1, -2], [], "live_block_ids has the negative id -2"),
        ([1], [-1], "pinned_block_ids has the negative id -1"),
        ([0.5], [], "list of integers, got float64"),
        ([[1]], [], "list of integers, got int64 of shape"),
    ],
)
def test_wrong_occupancies_are_refused(live: list, pinned: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_compaction(live, pinned_block_ids=pinned)


# -- arbitrary moves ------------------------------------------------------------------------------


def check_waves(
    sources: Sequence[int], destinations: Sequence[int], scratch: Sequence[int]
) -> MoveWaves:
    """Runs the waves on a list of contents; each must be free of hazards."""
    num_blocks = 1 + max([-1, *sources, *destinations, *scratch])
    contents = list(range(num_blocks))
    expected = list(contents)
    for source, destination in zip(sources, destinations, strict=True):
        expected[destination] = contents[source]
    waves = plan_waves(sources, destinations, scratch_block_ids=scratch)
    num_moves = 0
    for wave in waves:
        wave_sources, wave_destinations = wave.src_ids.tolist(), wave.dst_ids.tolist()
        assert wave_sources, "a wave without moves is a launch for nothing"
        assert len(set(wave_destinations)) == len(wave_destinations)
        assert not set(wave_sources) & set(wave_destinations)
        read = [contents[source] for source in wave_sources]
        for content, destination in zip(read, wave_destinations, strict=True):
            contents[destination] = content
        num_moves += len(wave_sources)
    for block in set(range(num_blocks)) - set(scratch):
        assert contents[block] == expected[block]
    cycles = cycles_of(sources, destinations)
    chained = sum(s != d for s, d in zip(sources, destinations, strict=True))
    assert num_moves == chained + len(cycles) == len(waves.moves.src_ids)
    return waves


def cycles_of(sources: Sequence[int], destinations: Sequence[int]) -> list[list[int]]:
    following = dict(zip(sources, destinations, strict=True))
    cycles = []
    left = set(sources)
    while left:
        path = [left.pop()]
        while following.get(path[-1]) in left:
            path.append(following[path[-1]])
            left.discard(path[-1])
        if len(path) > 1 and following[path[-1]] == path[0]:
            cycles.append(path)
    return cycles


def test_chains_take_one_wave_per_move_in_the_longest() -> None:
    waves = check_waves([1, 2, 3, 10, 20, 21], [2, 3, 4, 11, 21, 22], [])
    assert len(waves) == 3
    assert [len(wave.src_ids) for wave in waves] == [3, 2, 1]


@pytest.mark.parametrize("num_scratch", [1, 2, 5])
@pytest.mark.parametrize("seed", range(50))
def test_random_permutations(seed: int, num_scratch: int) -> None:
    random = np.random.default_rng(seed)
    num_blocks = int(random.integers(1, 60))
    ids = random.permutation(num_blocks).tolist()
    scratch = list(range(num_blocks, num_blocks + num_scratch))
    check_waves(list(range(num_blocks)), ids, scratch)


@pytest.mark.parametrize("seed", range(50))
def test_random_moves_between_some_blocks(seed: int) -> None:
    """Chains, cycles and blocks that stay, mixed."""
    random = np.random.default_rng(seed)
    num_blocks = 40
    num_moves = int(random.integers(0, num_blocks))
    sources = random.permutation(num_blocks)[:num_moves].tolist()
    destinations = random.permutation(num_blocks)[:num_moves].tolist()
    check_waves(sources, destinations, [num_blocks, num_blocks + 1])


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_no_order_of_copies_has_fewer(num_blocks: int) -> None:
    """Every permutation against all sequences of single copies, one scratch block at hand."""
    start = tuple(range(num_blocks + 1))
    fewest = {start: 0}
    queue = deque([start])
    while queue:  # all contents that copies can make, and how many they take
        state = queue.popleft()
        for source, destination in itertools.permutations(range(num_blocks + 1), 2):
            following = list(state)
            following[destination] = state[source]
            key = tuple(following)
            if key not in fewest:
                fewest[key] = fewest[state] + 1
                queue.append(key)
    for permutation in itertools.permutations(range(num_blocks)):
        wanted = [0] * num_blocks
        for source, destination in enumerate(permutation):
            wanted[destination] = source
        least = min(count for state, count in fewest.items() if list(state[:num_blocks]) == wanted)
        waves = check_waves(list(range(num_blocks)), list(permutation), [num_blocks])
        assert len(waves.moves.src_ids) == least


def test_cycles_on_scratch_blocks_of_their_own_run_together() -> None:
    swaps = [1, 0, 3, 2, 5, 4, 7, 6]
    one, four = (
        check_waves(list(range(8)), swaps, list(range(8, 8 + num_scratch)))
        for num_scratch in (1, 4)
    )
    assert (len(one), len(four)) == (12, 3)


def test_moves_to_where_a_block_is_are_dropped() -> None:
    waves = check_waves([1, 2, 3], [1, 5, 3], [])
    assert [wave.dst_ids.tolist() for wave in waves] == [[5]]
    assert len(check_waves([4], [4], [])) == 0
    assert len(check_waves([], [], [])) == 0


@pytest.mark.parametrize(
    ("sources", "destinations", "scratch", "message"),
    [
        ([1, 2], [2, 1], [], r"block 1 is on a cycle.*scratch_block_ids"),
        ([1, 1], [2, 3], [], "src_ids names block 1 more than once"),
        ([1, 2], [3, 3], [], "dst_ids names block 3 more than once"),
        ([1, 2], [2, 1], [2], "scratch block 2 is itself moved"),
        ([4], [4], [4], "scratch block 4 is itself moved"),
        ([1, 2], [2, 1], [5, 5], "scratch_block_ids names block 5 more than once"),
        ([1], [2, 3], [], "1 src_ids for 2 dst_ids"),
        ([-1], [2], [], "src_ids has the negative id -1"),
    ],
)
def test_wrong_moves_are_refused(
    sources: list[int], destinations: list[int], scratch: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_waves(sources, destinations, scratch_block_ids=scratch)


# -- size -----------------------------------------------------------------------------------------


def test_a_million_blocks() -> None:
    """Quadratic planning would take hours."""
    num_blocks = 1_000_000
    random = np.random.default_rng(0)
    live = np.flatnonzero(random.random(num_blocks) < 0.5)
    moves = plan_compaction(random.permutation(live))
    assert moves.src_ids.min() >= live.size > moves.dst_ids.max()
    assert moves.src_ids.size == np.count_nonzero(live >= live.size)

    permutation = random.permutation(num_blocks)
    waves = plan_waves(np.arange(num_blocks), permutation, scratch_block_ids=[num_blocks])
    contents = np.arange(num_blocks + 1)
    # One move at a time is how a processor without parallelism would run the waves.
    for source, destination in zip(*(ids.tolist() for ids in waves.moves), strict=True):
        contents[destination] = contents[source]
    assert np.array_equal(contents[permutation], np.arange(num_blocks))

    shifted = plan_waves(np.arange(num_blocks), np.arange(1, num_blocks + 1))
    assert len(shifted) == num_blocks
    assert np.array_equal(shifted.moves.src_ids, np.arange(num_blocks)[::-1])
