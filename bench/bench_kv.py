"""How fast do blocks of a KV cache move on the host, and does a block's size matter?

    pytest bench/bench_kv.py              (with --keep-results the figures go to results/)

Limit: one `memcpy` of the same bytes from one piece of memory to another. Blocks are scattered at
random over a cache twice as large. Peers, in turns with ours in the same run: torch's
`index_select(out=)` and `index_copy_`, which know one tensor of equal rows and nothing else; for
compaction, torch's `cache[dst] = cache[src]`. All by one thread; ours also by all threads that it
would take. (vLLM's swap_blocks and copy_blocks exist for CUDA only.) Goals: 0.8x of memcpy's
bandwidth, and faster than torch, from blocks of 4 KiB on.
"""

import ctypes
import mmap
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bench_memory import Timed
from measure import paired_ratio, quantiles

import aegaeon_kernels as ak
from aegaeon_kernels.kv_layout import KVLayout, Plane

KIB, MIB = 1 << 10, 1 << 20
MOVED = 128 * MIB
ROUNDS = 9


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def memory(size_bytes: int) -> torch.Tensor:
    """In huge pages and faulted in: every way of copying at its best."""
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    tile = torch.from_numpy(np.random.default_rng(0).integers(0, 256, MIB + 1, dtype=np.uint8))
    for begin in range(0, size_bytes, len(tile)):
        tensor[begin : begin + len(tile)] = tile[: size_bytes - begin]
    return tensor


class Cache:
    """Blocks of one page each, and half of them in random order."""

    def __init__(self, block_bytes: int) -> None:
        self.num_blocks = 2 * MOVED // block_bytes
        self.bytes = memory(2 * MOVED)
        self.rows = self.bytes.view(self.num_blocks, block_bytes)
        self.layout = KVLayout((Plane(0, block_bytes),), block_bytes, self.num_blocks, 2 * MOVED)
        order = np.random.default_rng(1).permutation(self.num_blocks)
        self.ids, self.others = np.split(order, 2)
        self.tensor_ids, self.tensor_others = map(torch.from_numpy, (self.ids, self.others))


def compare(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            with Timed(seconds[name]):
                way()
    return {name: values[1:] for name, values in seconds.items()}


def figures_of(seconds: dict[str, list[float]], ours: str, moved_bytes: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"rounds": len(seconds[ours])}
    for name, values in seconds.items():
        figures |= quantiles(f"{name}_ms", values)
        figures[f"{name}_gb_per_s"] = moved_bytes / statistics.median(values) / 1e9
        if name != ours:
            figures[f"of_{name}_bandwidth"] = paired_ratio(values, seconds[ours])
    return figures


@pytest.mark.parametrize("block_kib", [0.5, 4, 16, 64, 512])
def test_scattered_blocks(block_kib, record):
    """Out of the cache into one buffer, back in, and from place to place inside."""
    block_bytes = int(block_kib * KIB)
    cache = Cache(block_bytes)
    buffer, other = memory(MOVED), memory(MOVED)
    rows = buffer.view(-1, block_bytes)
    expected = cache.rows[cache.tensor_ids]

    def memcpy() -> None:
        ctypes.memmove(other.data_ptr(), cache.bytes.data_ptr(), MOVED)

    name = f"{block_kib:g} KiB"
    out = compare(
        {
            "memcpy": memcpy,
            "index_select": lambda: torch.index_select(cache.rows, 0, cache.tensor_ids, out=rows),
            "pack": lambda: ak.kv.pack(cache.bytes, cache.ids, buffer, cache.layout, num_threads=1),
            "pack_all_threads": lambda: ak.kv.pack(cache.bytes, cache.ids, buffer, cache.layout),
        },
        ROUNDS,
    )
    assert torch.equal(rows, expected)
    record(f"pack blocks of {name}", None, **figures_of(out, "pack", MOVED))

    back = compare(
        {
            "memcpy": memcpy,
            "index_copy": lambda: cache.rows.index_copy_(0, cache.tensor_ids, rows),
            "unpack": lambda: ak.kv.unpack(
                buffer, cache.bytes, cache.ids, cache.layout, num_threads=1
            ),
            "unpack_all_threads": lambda: ak.kv.unpack(
                buffer, cache.bytes, cache.ids, cache.layout
            ),
        },
        ROUNDS,
    )
    assert torch.equal(cache.rows[cache.tensor_ids], expected)
    record(f"unpack blocks of {name}", None, **figures_of(back, "unpack", MOVED))

    def by_torch() -> None:
        cache.rows[cache.tensor_others] = cache.rows[cache.tensor_ids]

    inside = compare(
        {
            "memcpy": memcpy,
            "torch": by_torch,
            "move": lambda: ak.kv.move(
                cache.bytes, cache.ids, cache.others, cache.layout, num_threads=1
            ),
            "move_all_threads": lambda: ak.kv.move(
                cache.bytes, cache.ids, cache.others, cache.layout
            ),
        },
        ROUNDS,
    )
    assert torch.equal(cache.rows[cache.tensor_others], expected)
    record(f"move blocks of {name}", None, **figures_of(inside, "move", MOVED))


@pytest.mark.parametrize("layers", [1, 32])
def test_a_block_in_many_pages(layers, record):
    """A tensor per layer costs pages a 32nd as large, and torch a call for every layer."""
    block_bytes = 512 * KIB
    page, num_blocks = block_bytes // layers, 2 * MOVED // block_bytes
    cache, buffer, other = memory(2 * MOVED), memory(MOVED), memory(MOVED)
    layout = KVLayout(
        tuple(Plane(i * num_blocks * page, page) for i in range(layers)),
        page,
        num_blocks,
        2 * MOVED,
    )
    ids = np.random.default_rng(2).permutation(num_blocks)[: num_blocks // 2]
    tensor_ids = torch.from_numpy(ids)
    tensors = cache.view(layers, num_blocks, page)
    rows = buffer.view(-1, layers, page)

    def by_torch() -> None:
        for layer in range(layers):
            rows[:, layer] = tensors[layer].index_select(0, tensor_ids)

    seconds = compare(
        {
            "memcpy": lambda: ctypes.memmove(other.data_ptr(), cache.data_ptr(), MOVED),
            "index_select": by_torch,
            "pack": lambda: ak.kv.pack(cache, ids, buffer, layout, num_threads=1),
            "pack_all_threads": lambda: ak.kv.pack(cache, ids, buffer, layout),
        },
        ROUNDS,
    )
    assert torch.equal(rows, tensors[:, tensor_ids].transpose(0, 1))
    record(f"pack blocks of 512 KiB in {layers} pages", None, **figures_of(seconds, "pack", MOVED))


def test_a_plan_for_a_million_blocks(record):
    """Planning is linear: it must not show beside the copies (a pool of 40 GB has 80,000 blocks of
    512 KiB; a million are some 500 GB).
    """
    random = np.random.default_rng(3)
    live = random.permutation(1_000_000)[:500_000]
    moves = ak.kv.plan_compaction(live)
    assert 0 < len(moves.src_ids) <= 500_000
    seconds = compare({"plan": lambda: ak.kv.plan_compaction(live)}, ROUNDS)
    figures = quantiles("plan_ms", seconds["plan"])
    record("plan the compaction of 1,000,000 blocks", None, moves=len(moves.src_ids), **figures)
