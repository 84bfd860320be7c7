"""How close do transfers come to the link, and how soon does a cancelled one let go of it?

Limit: the best plain copy of the same bytes between the same pinned memory and the same addresses,
by the driver's own calls: in one piece, in chunks, on two streams; in turns with ours. Goals: 0.95x
of its bandwidth; mapping and unmapping 5 % of its time; cancelled within two chunks.
"""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from measure import paired_ratio, quantiles
from setting import MIB, Model, PlainStream, Result, Setting, Stopwatch, model

import aegaeon_kernels as ak


def measure_transfers(setting: Setting) -> Iterator[Result]:
    with model(setting) as ours:
        ours.map()
        ours.load()
        ours.check()
        yield _loads(setting, ours)
        yield _both_directions(setting, ours)
        yield _cancellations(setting, ours)


def _loads(setting: Setting, ours: Model) -> Result:
    size, address, host = len(ours.image), ours.region.address, ours.image.address
    streams = [PlainStream(setting.device) for _ in range(2)]
    chunks = [
        (at, min(setting.chunk_bytes, size - at)) for at in range(0, size, setting.chunk_bytes)
    ]

    def in_one_piece() -> None:
        streams[0].load(address, host, size)
        streams[0].wait()

    def in_chunks() -> None:
        for at, length in chunks:
            streams[0].load(address + at, host + at, length)
        streams[0].wait()

    def on_two_streams() -> None:
        for i, (at, length) in enumerate(chunks):
            streams[i % 2].load(address + at, host + at, length)
        for stream in streams:
            stream.wait()

    ways = {f.__name__: f for f in (in_one_piece, in_chunks, on_two_streams)}
    watch = Stopwatch()
    for _ in range(setting.rounds):
        for name, way in ways.items():
            with watch(name):
                way()
        with watch("load"):
            ours.load()
        with watch("unmap"):
            ours.region.unmap()
        with watch("map"):
            ours.map()
    ours.load()
    ours.check()
    for stream in streams:
        stream.close()
    best = min(ways, key=lambda name: median(watch[name]))
    moving = [m + u for m, u in zip(watch["map"], watch["unmap"], strict=True)]
    figures: dict[str, Any] = {"result": "load against the best plain pinned copy"}
    for phase, seconds in watch.seconds.items():
        figures |= quantiles(f"{phase}_ms", seconds)
    return figures | {
        "best_plain": best,
        "gb_per_s": size / median(watch["load"]) / 1e9,
        "best_plain_gb_per_s": size / median(watch[best]) / 1e9,
        "of_plain_bandwidth": paired_ratio(watch[best], watch["load"]),
        "map_and_unmap_of_copy": paired_ratio(moving, watch[best]),
    }


def _both_directions(setting: Setting, ours: Model) -> Result:
    """Half of the region is loaded while the other half is stored."""
    half = len(ours.image) // 2
    pinned = ak.HostImage.allocate(half, device=setting.device, name="stored")
    lower, upper = [(0, half)], [(half, 0, half)]
    watch = Stopwatch()
    for _ in range(setting.rounds):
        with watch("load_alone"):
            ours.prefetcher.load(ours.image, ours.region, order=lower).wait()
        with watch("store_alone"):
            ours.prefetcher.store(ours.region, pinned, order=upper).wait()
        with watch("together"):
            tickets = [
                ours.prefetcher.load(ours.image, ours.region, order=lower),
                ours.prefetcher.store(ours.region, pinned, order=upper),
            ]
            for ticket in tickets:
                ticket.wait()
    if memoryview(pinned)[: 4 * MIB] != memoryview(ours.image)[half : half + min(4 * MIB, half)]:
        raise AssertionError("the stored bytes are wrong")
    slower = [max(pair) for pair in zip(watch["load_alone"], watch["store_alone"], strict=True)]
    figures: dict[str, Any] = {"result": "loading and storing at once", "bytes_each": half}
    for phase, seconds in watch.seconds.items():
        figures |= quantiles(f"{phase}_ms", seconds)
        figures[f"{phase}_gb_per_s_each"] = half / median(seconds) / 1e9
    # 1: the directions do not disturb each other; 2: they take turns.
    figures["together_of_slower"] = paired_ratio(watch["together"], slower)
    return figures


def _cancellations(setting: Setting, ours: Model) -> Result:
    seconds = []
    num_rounds = 10 * setting.rounds
    for i in range(num_rounds):
        ticket = ours.prefetcher.load(ours.image, ours.region)
        ticket.wait_bytes((1 + i % 4) * len(ours.image) // 16)
        started = time.perf_counter()
        ticket.cancel()
        try:
            ticket.wait()
        except ak.TransferCancelled:
            seconds.append(time.perf_counter() - started)
    chunk_s = setting.chunk_bytes / (ours.prefetcher.stats().load.gb_per_s * 1e9)
    figures: dict[str, Any] = {
        "result": "cancelling a load",
        "cancelled": len(seconds),
        "over_before": num_rounds - len(seconds),
        "chunk_us": chunk_s * 1e6,
    }
    if seconds:
        figures |= quantiles("cancel_us", seconds, scale=1e6)
        figures |= quantiles("cancel_in_chunks", seconds, scale=1 / chunk_s)
        figures["cancel_in_chunks_max"] = max(seconds) / chunk_s
    return figures
