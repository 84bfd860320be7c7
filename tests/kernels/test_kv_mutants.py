"""A mutation run: the KV kernel, its tables and the planners with one thing changed at a time.

Every mutant has to be noticed by a check that the original passes. What
is listed is not equivalent to the original; a change that cannot be noticed has no place here.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kv_support
import numpy as np
import pytest
import torch
from kv_support import SAMPLES, Guarded, random_bytes
from triton.runtime.interpreter import InterpretedFunction

import aegaeon_kernels as ak
from aegaeon_kernels import kv_compact, kv_copy, kv_layout, kv_tables

# Small, and different in what they need of the kernel.
CHECKED = (
    "per layer, padded pages",
    "block outermost, gaps between layers",
    "pages of 130 bytes",
    "hybrid, two page sizes",
    "several tiles a page, ragged end",
)


def check_copies() -> None:
    """pack, unpack and move by the kernel leave the bytes that plain slices would."""
    for name in CHECKED:
        sample = SAMPLES[name]
        num_blocks = min(layout.num_blocks for layout in sample.layouts)
        per_block = ak.kv.bytes_per_block(sample.layouts)
        ids, others = np.split(np.random.default_rng(1).permutation(num_blocks)[:4], 2)
        cache = Guarded(sample.part_bytes, seed=1)
        packed = Guarded((2 * per_block,), seed=2)
        before = cache.flat()
        positions = [bytes_of(sample.layouts, int(block)) for block in (*ids, *others)]
        wanted = torch.cat([before[positions[0]], before[positions[1]]])
        ak.kv.pack(cache.cache, ids, packed.tensors[0], sample.layouts, backend="triton")
        assert torch.equal(packed.flat(), wanted), name
        after = before.clone()
        for source, destination in zip(positions[:2], positions[2:], strict=True):
            after[destination] = before[source]
        ak.kv.move(cache.cache, ids, others, sample.layouts, backend="triton")
        assert torch.equal(cache.flat(), after), name
        contents = random_bytes(2 * per_block, seed=3)
        packed.tensors[0].copy_(contents)
        after[positions[2]], after[positions[3]] = contents[:per_block], contents[per_block:]
        ak.kv.unpack(packed.tensors[0], cache.cache, others, sample.layouts, backend="triton")
        packed.assert_is(contents)
        cache.assert_is(after)


def bytes_of(layouts: tuple[kv_layout.KVLayout, ...], block: int) -> torch.Tensor:
    pages = [
        torch.arange(offset + block * stride, offset + block * stride + layout.block_bytes)
        for layout in layouts
        for offset, stride in layout.planes
    ]
    return torch.unique(torch.cat(pages))


def check_plans() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        live = np.flatnonzero(random.random(40) < 0.5)
        pinned = random.choice(40, 2, replace=False)
        moves = kv_compact.plan_compaction(live, pinned_block_ids=pinned)
        sources, destinations = set(moves.src_ids.tolist()), set(moves.dst_ids.tolist())
        after = set(live.tolist()) - sources | destinations
        end = max(len({*live.tolist(), *pinned.tolist()}), int(pinned.max()) + 1)
        assert len(sources) == len(destinations)
        assert len(after) == len(live)
        assert max(after, default=-1) < end
        assert not destinations & set(live.tolist())
        assert not (sources | destinations) & set(pinned.tolist())
        assert len(sources) == sum(block >= end for block in live.tolist())
        used = kv_layout.KVLayout((kv_layout.Plane(0, 10), kv_layout.Plane(505, 12)), 10, 40, 1000)
        num_blocks = int(random.integers(1, 40))
        free = np.ones(1000, dtype=bool)
        for offset, stride in used.planes:
            free[offset : offset + (num_blocks - 1) * stride + 10] = False
        spare = kv_layout.unused_ranges([used], num_blocks, size_bytes=1000, alignment_bytes=100)
        found = {begin + i for begin, size in spare for i in range(0, size, 100)}
        assert found == {at for at in range(0, 1000, 100) if free[at : at + 100].all()}
    # A plane that ends before one that begins before it.
    planes = (kv_layout.Plane(0, 100), kv_layout.Plane(20, 10))
    nested = kv_layout.KVLayout(planes, 10, 8, 1000)
    spare = kv_layout.unused_ranges([nested], 8, size_bytes=1000, alignment_bytes=100)
    assert spare == [(800, 200)]


KERNEL_MUTANTS = [
    ("t = tl.program_id(0)", "t = tl.program_id(0) + 1"),
    ("while t < num_tiles:", "while t < num_tiles - 1:"),
    ("t += tl.num_programs(0)", "t += tl.num_programs(0) + 1"),
    ("tile = t - page * tiles_per_page", "tile = 0 * t"),
    ("move = page - plane * num_moves", "move = 0 * page"),
    ("row = planes + plane * 4", "row = planes"),
    ("tl.load(moves + move * 2 + 1)", "tl.load(moves + move * 2)"),
    ("tl.load(row) + src_id", "src_id"),
    ("src_id * tl.load(row + 1)", "src_id * tl.load(row + 3)"),
    ("tl.load(row + 2) + dst_id", "tl.load(row) + dst_id"),
    ("dst_id * tl.load(row + 3)", "dst_id * tl.load(row + 1)"),
    ("first = tile.to(tl.int64) * TILE_WORDS", "first = tile.to(tl.int64) * 0"),
    ("WORDS_PER_UNIT - first", "WORDS_PER_UNIT"),
    ("lane < page_units", "lane <= page_units"),
    ("lane < page_units", "lane + 1 < page_units"),
    ("(s * WORDS_PER_UNIT + first)", "(s + first)"),
    ("(d * WORDS_PER_UNIT + first)", "(d * WORDS_PER_UNIT)"),
]


FUNCTION_MUTANTS: list[tuple[Any, str, str, str]] = [
    (kv_tables, "_rows", "packed = (packed_offset,", "packed = (0,"),
    (kv_tables, "_rows", "part.distance_bytes + inside", "part.distance_bytes"),
    (kv_compact, "plan_compaction", "taken[pinned] = True", "pass"),
    (kv_compact, "plan_compaction", "movable[end_block:]) + end_block", "movable[end_block:])"),
    (kv_compact, "plan_compaction", "~taken[:end_block]", "~movable[:end_block]"),
    (kv_compact, "plan_compaction", "holes[: sources.size]", "holes[1 : sources.size + 1]"),
    (kv_compact, "plan_compaction", "max(num_taken, last_pinned + 1)", "num_taken"),
    (kv_layout, "unused_ranges", "(num_blocks - 1) * stride", "(num_blocks - 2) * stride"),
    (
        kv_layout,
        "unused_ranges",
        "-(-used_until // alignment_bytes)",
        "(used_until // alignment_bytes)",
    ),
    (kv_layout, "unused_ranges", "max(used_until, end)", "end"),
]


@pytest.fixture(autouse=True)
def wide_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mutant writes beside a cache is memory of the test all the same."""
    monkeypatch.setattr(kv_support, "GUARD_BYTES", 1 << 20)


@pytest.fixture(autouse=True)
def no_cached_tables() -> Iterator[None]:
    kv_tables.plane_tables.cache_clear()
    yield
    kv_tables.plane_tables.cache_clear()


def use_kernel(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel of this source be interpreted; Triton reads it from a file."""
    path = folder / "mutated_kv_copy.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = InterpretedFunction(module.copy_pages_kernel.fn)
    monkeypatch.setattr(kv_copy, "copy_pages_kernel", kernel)


def is_noticed(check: Callable[[], None]) -> bool:
    """By a wrong result, or by something that is refused or out of bounds."""
    try:
        check()
    except (AssertionError, ValueError, IndexError):
        return True
    return False


def test_the_originals_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernel(inspect.getsource(kv_copy), tmp_path, monkeypatch)
    check_copies()
    check_plans()


def test_every_mutant_of_the_kernel_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect.getsource(kv_copy)
    survivors = []
    for number, (old, new) in enumerate(KERNEL_MUTANTS):
        assert source.count(old) == 1, f"{old!r} is not there once"
        folder = tmp_path / str(number)
        folder.mkdir()
        use_kernel(source.replace(old, new), folder, monkeypatch)
        if not is_noticed(check_copies):
            survivors.append((old, new))
    assert survivors == []


@pytest.mark.parametrize(
    ("module", "name", "old", "new"),
    FUNCTION_MUTANTS,
    ids=[f"{name}-{number}" for number, (_, name, _, _) in enumerate(FUNCTION_MUTANTS)],
)
def test_a_mutant_of_a_plan_or_table_is_noticed(
    module: Any, name: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect.getsource(getattr(module, name))
    assert source.count(old) == 1, f"{old!r} is not there once"
    names = dict(vars(module))
    exec(
        compile("from __future__ import annotations\n" + source.replace(old, new), name, "exec"),
        names,
    )
    monkeypatch.setattr(module, name, names[name])
    if module is kv_tables:
        use_kernel(inspect.getsource(kv_copy), tmp_path, monkeypatch)
        assert is_noticed(check_copies)
    else:
        assert is_noticed(check_plans)
