"""pack, unpack and move against the definition in plain torch, byte for byte, guards included.

Backends: the native threads, and the Triton kernel as Triton's interpreter runs it (in order, in
numpy: addresses, masks and arithmetic are tested, races are not; that is why disjointness is a
property of every plan).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_support import (
    GUARD_BYTES,
    SAMPLES,
    Guarded,
    Sample,
    block_outermost,
    in_tensors,
    interpret,
    layer_outermost,
    random_bytes,
)

import aegaeon_kernels as ak
from aegaeon_kernels import kv_copy, reference
from aegaeon_kernels.kv_layout import KVLayout, Plane

BACKENDS = ("native", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "triton":
        interpret(monkeypatch)
    return request.param


def check_all(sample: Sample, backend: str, seed: int, num_ids: int = 11, **options: Any) -> None:
    """pack, unpack elsewhere, and move: all bytes are those of the reference."""
    random = np.random.default_rng(seed)
    layouts = sample.layouts
    num_blocks = min(layout.num_blocks for layout in layouts)
    per_block = ak.kv.bytes_per_block(layouts)
    num_ids = min(num_ids, num_blocks)

    ids = random.integers(0, num_blocks, num_ids)  # repeats allowed
    cache, out = Guarded(sample.part_bytes, seed), Guarded((num_ids * per_block + 7,), seed + 1)
    before, wanted = cache.flat(), out.flat()
    reference.pack(before, ids, wanted, layouts)
    (buffer,) = out.tensors
    copied = ak.kv.pack(cache.cache, ids, buffer, layouts, backend=backend, **options)
    assert copied == num_ids * per_block
    out.assert_is(wanted)
    cache.assert_is(before)

    ids = random.permutation(num_blocks)[:num_ids]
    cache, buf = Guarded(sample.part_bytes, seed), Guarded((num_ids * per_block + 7,), seed + 2)
    packed, wanted = buf.flat(), cache.flat()
    reference.unpack(packed, wanted, ids, layouts)
    (buffer,) = buf.tensors
    copied = ak.kv.unpack(buffer, cache.cache, ids, layouts, backend=backend, **options)
    assert copied == num_ids * per_block
    cache.assert_is(wanted)
    buf.assert_is(packed)

    sources, destinations = np.array_split(random.permutation(num_blocks), 2)
    destinations = destinations[: sources.size]
    sources = sources[: destinations.size]
    cache = Guarded(sample.part_bytes, seed)
    wanted = cache.flat()
    reference.move(wanted, sources, destinations, layouts)
    copied = ak.kv.move(cache.cache, sources, destinations, layouts, backend=backend, **options)
    assert copied == sources.size * per_block
    cache.assert_is(wanted)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_layout_is_copied_exactly(name: str, backend: str) -> None:
    check_all(SAMPLES[name], backend, seed=len(name))


@pytest.mark.parametrize("page", [1, 2, 3, 31, 64, 130, 656, 2047, 4096, 4097, 8192 + 16, 32800])
def test_pages_of_every_size(page: int, backend: str) -> None:
    check_all(layer_outermost(page, 2, blocks=7), backend, seed=page)
    check_all(block_outermost(page, 2, gap=5, blocks=7), backend, seed=page)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("page", [512, 24_000, 2 << 20])
def test_threads_share_out_pages(page: int, num_threads: int) -> None:
    """Enough bytes for several threads, and for the copies that pass the caches by."""
    blocks = (16 << 20) // page // 2 * 2
    sample = layer_outermost(page, 2, blocks=blocks)
    random = np.random.default_rng(page + num_threads)
    ids, others = (torch.from_numpy(half) for half in random.permutation(blocks).reshape(2, -1))
    guarded = Guarded(sample.part_bytes, seed=page)
    wanted = guarded.flat()
    pages = wanted.view(2, blocks, page)
    out = Guarded((len(ids) * 2 * page,), seed=1)

    def run(operation: Any, *arguments: Any) -> None:
        operation(*arguments, sample.layouts, backend="native", num_threads=num_threads)

    run(ak.kv.pack, guarded.cache, ids, out.cache)
    out_bytes = out.flat()
    assert torch.equal(out_bytes.view(-1, 2, page), pages[:, ids].transpose(0, 1))
    run(ak.kv.move, guarded.cache, ids, others)
    pages[:, others] = pages[:, ids]
    assert torch.equal(guarded.flat(), wanted)
    run(ak.kv.unpack, out.cache, guarded.cache, ids.flip(0))
    pages[:, ids.flip(0)] = out_bytes.view(-1, 2, page).transpose(0, 1)
    guarded.assert_is(wanted)
    out.assert_is(out_bytes)


@pytest.mark.parametrize("offset", range(1, 64, 7))
def test_threads_copy_to_any_alignment(offset: int) -> None:
    sample = block_outermost(6007, 1, blocks=2000)
    cache = random_bytes(sample.size_bytes, offset)
    ids = np.random.default_rng(offset).permutation(2000)[:1000]
    out = torch.zeros(1000 * 6007 + offset + GUARD_BYTES, dtype=torch.uint8)
    ak.kv.pack(cache, ids, out[offset : offset + 1000 * 6007], sample.layouts, backend="native")
    wanted = cache.view(2000, 6007)[torch.from_numpy(ids)].reshape(-1)
    assert torch.equal(out[offset : offset + 1000 * 6007], wanted)
    assert not out[:offset].any()
    assert not out[offset + 1000 * 6007 :].any()


@pytest.mark.parametrize("max_ctas", [1, 2, 5, 1000])
def test_any_number_of_programs_copies_all(max_ctas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)
    monkeypatch.setattr(kv_copy, "CAPPED_LAUNCH_BYTES", 3 * 16384)
    for name in ("several tiles a page, ragged end", "fp8 with scales beside"):
        check_all(SAMPLES[name], "triton", seed=max_ctas, max_ctas=max_ctas)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    page = draw(st.sampled_from([1, 3, 8, 16, 48, 100, 512, 5000]))
    blocks = draw(st.integers(1, 9))
    layers = draw(st.integers(1, 4))
    if draw(st.booleans()):
        stride = page + draw(st.sampled_from([0, 1, 4, 16]))
        sample = layer_outermost(page, layers, blocks=blocks, stride=stride)
        return in_tensors(sample, draw(st.sampled_from([1, layers])))
    gap, padding = draw(st.integers(0, 5)), draw(st.integers(0, 17))
    return block_outermost(page, layers, gap=gap, padding=padding, blocks=blocks)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
@given(sample=samples(), seed=st.integers(0, 2**32 - 1), num_ids=st.integers(0, 9))
def test_random_layouts_and_block_tables(
    backend: str, sample: Sample, seed: int, num_ids: int
) -> None:
    check_all(sample, backend, seed=seed, num_ids=num_ids)


def test_the_dtype_and_shape_of_tensors_do_not_matter(backend: str) -> None:
    sample = layer_outermost(256, 2)
    cache = random_bytes(sample.size_bytes, 0)
    out, again = torch.zeros(512, dtype=torch.uint8), torch.zeros(2, 64, dtype=torch.float32)
    ak.kv.pack(cache, [5], out, sample.layouts, backend=backend)
    shaped = cache.view(torch.bfloat16).view(2, 24, 2, 64)
    ak.kv.pack(shaped, (5,), again, sample.layouts[0], backend=backend)
    assert torch.equal(again.view(torch.uint8).view(-1), out)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_ids_come_as_any_list_of_integers(make: Any, backend: str) -> None:
    sample = layer_outermost(64, 2)
    cache, out = random_bytes(sample.size_bytes, 0), torch.zeros(3 * 128, dtype=torch.uint8)
    wanted = out.clone()
    reference.pack(cache, [7, 0, 23], wanted, sample.layouts)
    ak.kv.pack(cache, make([7, 0, 23]), out, sample.layouts, backend=backend)
    assert torch.equal(out, wanted)
    ids32 = np.array([7, 0, 23], dtype=np.int32)
    ak.kv.pack(cache, ids32, out.zero_(), sample.layouts, backend=backend)
    assert torch.equal(out, wanted)


def test_no_blocks_are_no_bytes(backend: str) -> None:
    sample = layer_outermost(64, 2)
    cache, nothing = random_bytes(sample.size_bytes, 0), torch.empty(0, dtype=torch.uint8)
    before = cache.clone()
    assert ak.kv.pack(cache, [], nothing, sample.layouts, backend=backend) == 0
    assert ak.kv.unpack(nothing, cache, [], sample.layouts, backend=backend) == 0
    assert ak.kv.move(cache, [], [], sample.layouts, backend=backend) == 0
    assert torch.equal(cache, before)


# -- offsets beyond 32 bits -----------------------------------------------------------------------


def sparse(size_bytes: int) -> torch.Tensor:
    """Reserved address space: what is never touched takes no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size_bytes, flags=flags), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("page", "stride", "num_blocks"),
    [
        pytest.param(4096, 1 << 20, 5000, id="bytes beyond 4 GiB"),
        pytest.param(48, 8 << 20, 5000, id="units of 16 bytes beyond 2^31"),
        pytest.param(4096 + 8, (1 << 20) + 8, 9000, id="units of 8 bytes"),
        pytest.param(33, 1_000_003, 6000, id="units of 1 byte"),
    ],
)
def test_offsets_beyond_4_gib_do_not_wrap(
    page: int, stride: int, num_blocks: int, backend: str
) -> None:
    second = num_blocks * stride
    cache = sparse(2 * second)
    layout = KVLayout((Plane(0, stride), Plane(second, stride)), page, num_blocks, 2 * second)
    ids = [0, 1, num_blocks // 2, num_blocks - 1]
    pages = {
        (plane, block): cache[plane * second + block * stride :][:page]
        for plane in (0, 1)
        for block in (*ids, 7, num_blocks - 2, 3, 4, 5, num_blocks - 3)
    }
    contents = {at: random_bytes(page, at[0] * num_blocks + at[1]) for at in pages}
    for at, tensor in pages.items():
        tensor.copy_(contents[at])

    out = torch.zeros(len(ids) * 2 * page, dtype=torch.uint8)
    ak.kv.pack(cache, ids, out, layout, backend=backend)
    wanted = [contents[plane, block] for block in ids for plane in (0, 1)]
    assert torch.equal(out, torch.cat(wanted))

    sources, destinations = [num_blocks - 1, 1], [7, num_blocks - 2]
    ak.kv.move(cache, sources, destinations, layout, backend=backend)
    for source, destination in zip(sources, destinations, strict=True):
        for plane in (0, 1):
            assert torch.equal(pages[plane, destination], contents[plane, source])

    targets = [3, 4, 5, num_blocks - 3]
    ak.kv.unpack(out, cache, targets, layout, backend=backend)
    for i, target in enumerate(targets):
        for plane in (0, 1):
            assert torch.equal(pages[plane, target], wanted[2 * i + plane])
    for plane in (0, 1):
        for block in ids:
            assert torch.equal(pages[plane, block], contents[plane, block])


# -- what is refused ------------------------------------------------------------------------------


class Refused:
    """A sound call, to be spoilt in one place."""

    def __init__(self) -> None:
        self.layout = layer_outermost(64, 2, blocks=10).layouts[0]
        self.memory = random_bytes(1280 + 640, 0)
        self.cache = self.memory[:1280]
        self.out = torch.zeros(256, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 10], "block_ids 0..10 are outside a cache of 10 blocks"),
        ([-1, 3], "block_ids -1..3 are outside"),
        ([1.0, 2.0], "list of integers, got float64"),
        ([[1, 2]], "list of integers, got int64 of shape"),
        (np.array([1, 2**63], dtype=np.uint64), "outside a cache"),
    ],
)
def test_wrong_ids_are_refused(ids: Any, message: str, backend: str) -> None:
    call = Refused()
    with pytest.raises(ValueError, match=message):
        ak.kv.pack(call.cache, ids, call.out, call.layout, backend=backend)
    with pytest.raises(ValueError, match=message):
        ak.kv.unpack(call.out, call.cache, ids, call.layout, backend=backend)
    assert not call.out.any()


def test_a_block_cannot_get_two_contents(backend: str) -> None:
    call = Refused()
    before = call.memory.clone()
    with pytest.raises(ValueError, match="block_ids names block 4 twice"):
        ak.kv.unpack(call.out, call.cache, [4, 4], call.layout, backend=backend)
    with pytest.raises(ValueError, match="dst_ids names block 5 twice"):
        ak.kv.move(call.cache, [1, 2, 3], [5, 6, 5], call.layout, backend=backend)
    with pytest.raises(ValueError, match=r"block 2 is a source and a destination.*plan_waves"):
        ak.kv.move(call.cache, [1, 2], [2, 3], call.layout, backend=backend)
    with pytest.raises(ValueError, match="2 src_ids for 1 dst_ids"):
        ak.kv.move(call.cache, [1, 2], [3], call.layout, backend=backend)
    assert torch.equal(call.memory, before)


def test_one_block_may_be_copied_to_several(backend: str) -> None:
    call = Refused()
    wanted = call.cache.clone()
    reference.move(wanted, [1, 1], [2, 3], [call.layout])
    ak.kv.move(call.cache, [1, 1], [2, 3], call.layout, backend=backend)
    assert torch.equal(call.cache, wanted)


def test_ids_known_to_be_right_need_no_checks(backend: str) -> None:
    call = Refused()
    wanted = torch.zeros(256, dtype=torch.uint8)
    reference.pack(call.cache, [9, 1], wanted, [call.layout])
    ak.kv.pack(call.cache, [9, 1], call.out, call.layout, check_ids=False, backend=backend)
    assert torch.equal(call.out, wanted)
    # The checks, not the copy, are what refuses: nothing is read or written here.
    ak.kv.move(call.cache, [4], [4], call.layout, check_ids=False, backend=backend)


def test_wrong_tensors_are_refused(backend: str) -> None:
    call = Refused()
    elsewhere = torch.zeros(256, dtype=torch.uint8, device="meta")
    whole = call.memory

    def refuse(message: str, cache: Any, buffer: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message.replace("BUFFER", "out")):
            ak.kv.pack(cache, [1, 2], buffer, call.layout, backend=backend)
        with pytest.raises(ValueError, match=message.replace("BUFFER", "buf")):
            ak.kv.unpack(buffer, cache, [1, 2], call.layout, backend=backend)

    refuse("the cache has 1279 bytes, its layout 1280", call.cache[:1279], call.out)
    refuse(r"cache tensor of shape \(640, 2\) is not", call.cache.view(2, 640).T, call.out)
    refuse("cache is an empty list", [], call.out)
    refuse("cache tensors on cpu and meta", [call.cache, elsewhere], call.out)
    refuse("BUFFER has 255 bytes, the blocks need 256", call.cache, call.out[:255])
    refuse("BUFFER is on meta, the cache on cpu", call.cache, elsewhere)
    refuse(r"BUFFER of shape \(16, 16\) is not contiguous", call.cache, call.out.view(16, 16).T)
    refuse("BUFFER overlaps the cache", call.cache, whole[1279:1600])
    refuse("BUFFER overlaps the cache", whole[320 : 320 + 1280], whole[:321])
    refuse(
        "the plane at 640 of the layout ends 40 bytes behind the tensor",
        [whole[:640], whole[640:1240], whole[1240:]],
        call.out,
    )
    assert not call.out.any()


def test_a_buffer_right_beside_the_cache_is_memory_of_its_own(backend: str) -> None:
    call = Refused()
    wanted = call.memory.clone()
    reference.pack(wanted[:1280], [1, 2], wanted[1280:], [call.layout])
    ak.kv.pack(call.cache, [1, 2], call.memory[1280:], call.layout, backend=backend)
    assert torch.equal(call.memory, wanted)


def test_wrong_options_are_refused() -> None:
    call = Refused()
    for options, message in (
        ({"max_ctas": 0}, "max_ctas=0 has to be at least 1"),
        ({"num_threads": -1}, "num_threads=-1 has to be at least 1"),
        ({"backend": "cuda"}, "unknown backend 'cuda': expected"),
        ({"backend": "triton"}, "for tensors on the CPU use the native backend"),
    ):
        with pytest.raises(ValueError, match=message):
            ak.kv.pack(call.cache, [1], call.out, call.layout, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one KV layout"):
        ak.kv.pack(call.cache, [1], call.out, [])


def test_on_the_cpu_there_is_nothing_to_warm_up() -> None:
    call = Refused()
    before = call.memory.clone()
    ak.kv.warm_up(call.cache, call.out, call.layout)
    assert torch.equal(call.memory, before)
    assert not call.out.any()
