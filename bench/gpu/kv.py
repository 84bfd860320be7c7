"""How fast do KV blocks move: inside the device, over the link, and beside a model that decodes?

Limits: a plain copy of the same bytes on the device, and of the same bytes over the link in one
piece. Goals: pack and move at 0.9x of the first from pages of 4 KiB on; 1 GiB in scattered blocks
of 16 tokens at 0.95x of the second; the compaction of 40 GB, half of it live, in 5 ms; with few
programs at a time, 10 % more for the 99th percentile of a decode step. Peers: torch's index_select
and index_copy_, vLLM's swap_blocks_batch.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import numpy as np
from decode import Decoder, GraphDecoder, HostDecoder, p99, timed_steps
from measure import paired_ratio, quantiles
from setting import KIB, PlainStream, Result, Setting, Skipped

import aegaeon_kernels as ak
from aegaeon_kernels.kv_layout import KVLayout, Plane

PAGE_BYTES = (512, 2 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 512 * KIB, 2048 * KIB)
# 16 tokens of 8 heads of 128 bf16 values, K and V, in 32 layers: 2 MiB, or 64 pages of 32 KiB.
NUM_PAGES, PAGE = 64, 32 * KIB
# Programs at a time beside a decoding model; None: the whole device.
CAPS = (8, 32, None)
CAPPED = 8  # enough for the link


class Torch:
    """torch on the device that is measured; on the host device, its CPU."""

    def __init__(self, device: ak.Device) -> None:
        try:
            import torch
        except ImportError as error:
            raise Skipped(f"torch is not importable: {error}") from error
        if device.kind == "cuda":
            if not torch.cuda.is_available():
                raise Skipped("torch has no CUDA device here")
            torch.cuda.set_device(device.name)
        self.torch: Any = torch
        self.name = "cpu" if device.kind == "host" else device.name

    def bytes(self, size_bytes: int) -> Any:
        """Random enough for a wrong block to show, without a host copy of it all."""
        tensor = self.torch.arange(size_bytes // 8, device=self.name, dtype=self.torch.int64)
        return tensor.mul_(0x9E3779B97F4A7C15 - (1 << 64)).view(self.torch.uint8)

    def wait(self) -> None:
        if self.name != "cpu":
            self.torch.cuda.synchronize()

    def stream(self) -> Any:
        return nullcontext() if self.name == "cpu" else self.torch.cuda.stream(self._new_stream())

    def _new_stream(self) -> Any:
        return self.torch.cuda.Stream()

    def compare(self, ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Seconds of each way to its end, in turns; the first turn is not counted."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                self.wait()
                started = time.perf_counter()
                way()
                self.wait()
                seconds[name].append(time.perf_counter() - started)
        return {name: values[1:] for name, values in seconds.items()}


def measure_kv(setting: Setting) -> Iterator[Result]:
    torch = Torch(setting.device)
    for page_bytes in PAGE_BYTES:
        if page_bytes * 4 <= setting.kv_bytes:
            yield from _pages(setting, torch, page_bytes)
    for layers_outermost in (False, True):
        yield from _swap(setting, torch, layers_outermost)
    yield from _compaction(setting, torch)


def _pages(setting: Setting, torch: Torch, page_bytes: int) -> Iterator[Result]:
    """Half of the pages of a cache, in random order."""
    setting.require_device_memory(setting.kv_bytes * 2)
    num_pages = setting.kv_bytes // page_bytes
    cache = torch.bytes(num_pages * page_bytes)
    rows = cache.view(num_pages, page_bytes)
    layout = KVLayout((Plane(0, page_bytes),), page_bytes, num_pages, len(cache))
    ids, others = np.split(np.random.default_rng(0).permutation(num_pages // 2 * 2), 2)
    on_device = torch.torch.from_numpy(ids).to(torch.name)
    buffer = torch.bytes(len(ids) * page_bytes)
    packed, plain = buffer.view(-1, page_bytes), torch.bytes(len(buffer))
    expected = rows[on_device]
    ways = {
        "plain_copy": lambda: plain.copy_(buffer),
        "index_select": lambda: torch.torch.index_select(rows, 0, on_device, out=packed),
        "pack": lambda: ak.kv.pack(cache, ids, buffer, layout),
        "pack_capped": lambda: ak.kv.pack(cache, ids, buffer, layout, max_ctas=CAPPED),
        "index_copy": lambda: rows.index_copy_(0, on_device, packed),
        "unpack": lambda: ak.kv.unpack(buffer, cache, ids, layout),
        "move": lambda: ak.kv.move(cache, ids, others, layout),
    }
    seconds = torch.compare(ways, setting.rounds)
    _require(torch, packed, expected, "pack")
    _require(torch, rows[on_device], expected, "unpack")
    _require(torch, rows[torch.torch.from_numpy(others).to(torch.name)], expected, "move")
    figures: dict[str, Any] = {"result": f"KV pages of {page_bytes} bytes", "moved": len(buffer)}
    for name, values in seconds.items():
        figures |= quantiles(f"{name}_ms", values)
        figures[f"{name}_gb_per_s"] = 2 * len(buffer) / median(values) / 1e9  # read and written
        if name != "plain_copy":
            figures[f"{name}_of_plain"] = paired_ratio(seconds["plain_copy"], values)
    yield figures


def _require(torch: Torch, found: Any, expected: Any, what: str) -> None:
    if not torch.torch.equal(found, expected):
        raise AssertionError(f"{what}: wrong bytes")


def _swap(setting: Setting, torch: Torch, layers_outermost: bool) -> Iterator[Result]:
    """swap_bytes in scattered blocks to pinned memory and back, by every path."""
    block_bytes = NUM_PAGES * PAGE
    num_live = max(1, setting.swap_bytes // block_bytes)
    num_blocks = 2 * num_live
    size = num_blocks * block_bytes
    setting.require_device_memory(size + num_live * block_bytes)
    if layers_outermost:
        planes = tuple(Plane(i * num_blocks * PAGE, PAGE) for i in range(NUM_PAGES))
        layout, what = KVLayout(planes, PAGE, num_blocks, size), "64 pages of 32 KiB"
    else:
        layout = KVLayout((Plane(0, block_bytes),), block_bytes, num_blocks, size)
        what = "one page of 2 MiB"
    ids = np.random.default_rng(0).permutation(num_blocks)[:num_live]
    moved = num_live * block_bytes
    device = setting.device
    capacity = -(-(size + moved) // device.granularity_bytes) * device.granularity_bytes
    host = ak.HostImage.allocate(moved, device=device, name="swapped")
    order = [tuple(row) for row in ak.kv.packed_copies((layout,), ids, range(num_live)).tolist()]
    with (
        ak.Arena(device, capacity_bytes=capacity) as arena,
        ak.Prefetcher(device, chunk_bytes=setting.chunk_bytes) as prefetcher,
    ):
        cache = arena.reserve(size, owner="cache", tag="kv")
        staging = arena.reserve(moved, owner="staging")
        for region in (cache, staging):
            region.map(contents="preserve")
        seconds = _time_swaps(setting, torch, layout, ids, cache, staging, host, prefetcher, order)
    figures: dict[str, Any] = {
        "result": f"swap of scattered blocks, each {what}",
        "moved": moved,
        "pieces": len(order),
        "mean_piece_bytes": moved / len(order),
    }
    for name, values in seconds.items():
        figures |= quantiles(f"{name}_ms", values)
        figures[f"{name}_gb_per_s"] = moved / median(values) / 1e9
        limit = f"{name.partition('_')[0]}_one_piece"
        if name != limit:
            figures[f"{name}_of_link"] = paired_ratio(seconds[limit], values)
    if "out_vllm" not in seconds:
        figures["vllm"] = "not compared: no swap_blocks_batch for this device"
    yield figures


def _time_swaps(
    setting: Setting,
    torch: Torch,
    layout: KVLayout,
    ids: Any,
    cache: ak.Region,
    staging: ak.Region,
    host: ak.HostImage,
    prefetcher: ak.Prefetcher,
    order: list[tuple[int, ...]],
) -> dict[str, list[float]]:
    """Seconds by path. A function of its own: with it go the views of the regions."""
    device, moved = setting.device, len(host)
    cache.copy_from(torch.bytes(layout.size_bytes))
    buffer = staging.tensor((moved,), torch.torch.uint8)
    tensor = cache.tensor((cache.size_bytes,), torch.torch.uint8)
    expected = torch.bytes(moved)
    ak.kv.pack(tensor, ids, expected, layout)
    plain = PlainStream(device)

    def one_piece(out: bool) -> None:
        if out:
            plain.store(host.address, staging.address, moved)
        else:
            plain.load(staging.address, host.address, moved)
        plain.wait()

    def packed_out() -> None:
        ak.kv.pack(tensor, ids, buffer, layout, max_ctas=CAPPED)
        torch.wait()
        prefetcher.store(staging, host).wait()

    def packed_in() -> None:
        prefetcher.load(host, staging).wait()
        ak.kv.unpack(buffer, tensor, ids, layout, max_ctas=CAPPED)

    ways: dict[str, Callable[[], Any]] = {
        "out_one_piece": lambda: one_piece(True),
        "out_pieces": lambda: prefetcher.store(cache, host, order=order).wait(),
        "out_packed": packed_out,
        "in_one_piece": lambda: one_piece(False),
        "in_pieces": lambda: prefetcher.load(host, cache, order=order).wait(),
        "in_packed": packed_in,
    }
    peer = _swap_blocks_batch(device, torch, cache.address, host.address, order)
    if peer is not None:
        ways |= {"out_vllm": lambda: peer(True), "in_vllm": lambda: peer(False)}
    seconds = torch.compare(ways, setting.rounds)
    ak.kv.pack(tensor, ids, buffer, layout)
    _require(torch, buffer, expected, "swap")
    plain.close()
    return seconds


def _swap_blocks_batch(
    device: ak.Device, torch: Torch, cache: int, host: int, order: list[tuple[int, ...]]
) -> Callable[[bool], None] | None:
    """vLLM's way, with its pointers made beforehand; None where there is none."""
    if device.kind == "host":
        return None
    try:
        from vllm._custom_ops import swap_blocks_batch
    except ImportError:
        return None
    if not hasattr(torch.torch.ops._C_cache_ops, "swap_blocks_batch"):
        return None
    offsets = np.array(order, dtype=np.int64)
    on_device, on_host, sizes = (
        torch.torch.from_numpy(np.ascontiguousarray(column))
        for column in (offsets[:, 0] + cache, offsets[:, 1] + host, offsets[:, 2])
    )

    def swap(out: bool) -> None:
        source, destination = (on_device, on_host) if out else (on_host, on_device)
        swap_blocks_batch(source, destination, sizes)

    return swap


def _compaction(setting: Setting, torch: Torch) -> Iterator[Result]:
    block_bytes = 512 * KIB
    num_blocks = setting.pool_bytes // block_bytes
    setting.require_device_memory(setting.pool_bytes)
    pool = torch.bytes(num_blocks * block_bytes)
    layout = KVLayout((Plane(0, block_bytes),), block_bytes, num_blocks, len(pool))
    live = np.random.default_rng(0).permutation(num_blocks)[: num_blocks // 2]
    plan_s = torch.compare({"plan": lambda: ak.kv.plan_compaction(live)}, setting.rounds)["plan"]
    moves = ak.kv.plan_compaction(live)
    if not len(moves.src_ids):
        raise Skipped("nothing to move in so small a pool")

    def move(cap: int | None) -> None:
        ak.kv.move(pool, *moves, layout, max_ctas=cap, check_ids=False)

    ways = {f"move_{_name(cap)}": lambda cap=cap: move(cap) for cap in CAPS}
    seconds = torch.compare(ways, setting.rounds)
    rows = pool.view(num_blocks, block_bytes)
    sources, targets = (torch.torch.from_numpy(ids).to(torch.name) for ids in moves)
    _require(torch, rows[sources[:64]], rows[targets[:64]], "compaction")
    figures: dict[str, Any] = {
        "result": "compaction of a pool, half of it live",
        "pool_bytes": len(pool),
        "moved": len(moves.src_ids) * block_bytes,
        **quantiles("plan_ms", plan_s),
    }
    for name, values in seconds.items():
        figures |= quantiles(f"{name}_ms", values)
    yield figures
    yield from _beside_decoding(setting, torch, move)


def _name(cap: int | None) -> str:
    return "full_grid" if cap is None else f"{cap}_programs"


def _beside_decoding(
    setting: Setting, torch: Torch, move: Callable[[int | None], None]
) -> Iterator[Result]:
    host = HostDecoder(setting.device) if setting.device.kind == "host" else None
    decoder: Decoder = host or GraphDecoder(setting.device)
    timed_steps(decoder, 10)
    steps: dict[str, list[float]] = {"alone": [], **{_name(cap): [] for cap in CAPS}}
    for _ in range(setting.rounds):
        steps["alone"] += timed_steps(decoder, setting.decode_steps)
        for cap in CAPS:
            with _repeating(torch, lambda cap=cap: move(cap)):
                steps[_name(cap)] += timed_steps(decoder, setting.decode_steps)
    if host is not None:
        host.close()
    alone = p99(steps["alone"])
    for name, seconds in steps.items():
        yield {
            "result": f"decoding ({decoder.name}) beside compaction, {name}",
            **quantiles("step_us", seconds, scale=1e6),
            "step_us_p99": p99(seconds) * 1e6,
            "p99_of_alone": p99(seconds) / alone,
        }


@contextmanager
def _repeating(torch: Torch, work: Callable[[], None]) -> Iterator[None]:
    """Inside the block `work` runs over and over, on a stream and a thread of its own."""
    stop = threading.Event()
    errors: list[Exception] = []

    def repeat() -> None:
        try:
            with torch.stream():
                while not stop.is_set():
                    work()
                    if torch.name != "cpu":
                        torch.torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
