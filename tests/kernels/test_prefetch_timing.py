"""What the prefetcher promises about time, in exact numbers of a simulated link.

One copy engine per direction, first come first served; the clock is virtual, so nothing here
depends on how busy this machine is.
"""

from __future__ import annotations

import numpy as np
import pytest
from prefetch_support import SOON

import aegaeon_kernels as ak
from aegaeon_kernels.testing import SimulatedCopy, SimulatedDevice

MIB = 1 << 20
SIZE = 64 * MIB
LINK = 55.6e9  # bytes/s: PCIe 5 x16
US = 1e-6
NS = 1e-8  # the clock counts whole nanoseconds, and chunks add up


class Link:
    """An image, a region, and a prefetcher on a simulated link."""

    def __init__(
        self,
        *,
        chunk_bytes: int = 8 * MIB,
        depth: int = 2,
        overhead_s: float = 0.0,
        wake_latency_s: float = 0.0,
        max_bytes_per_s: float | None = None,
        cap_exempt_priority: int | None = None,
    ) -> None:
        self.device = SimulatedDevice(
            memory_bytes=2 * SIZE,
            bytes_per_s=LINK,
            copy_overhead_s=overhead_s,
            wake_latency_s=wake_latency_s,
        )
        self.arena = ak.Arena(self.device, capacity_bytes=2 * SIZE)
        self.region = self.arena.reserve(SIZE, owner="a")
        self.region.map()
        self.other_region = self.arena.reserve(SIZE, owner="b")
        self.other_region.map()
        self.image = ak.HostImage.allocate(SIZE, device=self.device)
        self.other_image = ak.HostImage.allocate(SIZE, device=self.device)
        self.chunk_s = overhead_s + chunk_bytes / LINK
        self.prefetcher = ak.Prefetcher(
            self.device,
            chunk_bytes=chunk_bytes,
            depth=depth,
            max_bytes_per_s=max_bytes_per_s,
            cap_exempt_priority=cap_exempt_priority,
        )

    def load(self, **options: object) -> ak.Ticket:
        return self.prefetcher.load(self.image, self.region, **options)

    def store(self, **options: object) -> ak.Ticket:
        return self.prefetcher.store(self.other_region, self.other_image, **options)

    def copies(self, call: str = "memcpy_h2d_async") -> list[SimulatedCopy]:
        return [copy for copy in self.device.copies if copy.call == call]

    def copies_from(self, offset: int) -> list[SimulatedCopy]:
        return [
            copy for copy in self.copies() if copy.device_address - self.region.address >= offset
        ]

    def close(self) -> None:
        self.prefetcher.close()
        self.arena.close()


# The table of chunk sizes in docs/memory.md: chunk, its time, and the share of the link that is
# left by gaps of 2, 5 and 10 us.
EFFICIENCY = [
    (1, 19, (90.4, 79.0, 65.3)),
    (4, 75, (97.4, 93.8, 88.3)),
    (8, 151, (98.7, 96.8, 93.8)),
    (16, 302, (99.3, 98.4, 96.8)),
    (32, 603, (99.7, 99.2, 98.4)),
]


@pytest.mark.parametrize(("chunk_mib", "time_us", "shares"), EFFICIENCY)
def test_efficiency_follows_the_chunk_size(
    chunk_mib: int, time_us: int, shares: tuple[float, ...]
) -> None:
    assert round(chunk_mib * MIB / LINK * 1e6) == time_us
    for gap_us, share in zip((2, 5, 10), shares, strict=True):
        link = Link(chunk_bytes=chunk_mib * MIB, overhead_s=gap_us * US)
        link.load().wait(SOON)
        took = link.copies()[-1].end_s
        assert took == pytest.approx(SIZE // (chunk_mib * MIB) * link.chunk_s, rel=1e-4)
        assert 100 * SIZE / LINK / took == pytest.approx(share, abs=0.06)
        link.close()


@pytest.mark.parametrize(("depth", "idle_per_chunk_us"), [(1, 100), (2, 0), (3, 0)])
def test_two_chunks_in_flight_hide_a_late_thread(depth: int, idle_per_chunk_us: int) -> None:
    """A thread that wakes up 100 us after each chunk of 151: the link never idles at depth 2."""
    link = Link(depth=depth, wake_latency_s=100 * US)
    link.load().wait(SOON)
    num_chunks = SIZE // (8 * MIB)
    expected = num_chunks * link.chunk_s + (num_chunks - 1) * idle_per_chunk_us * US
    assert link.copies()[-1].end_s == pytest.approx(expected, rel=1e-5)
    link.close()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("at_chunks", [0.25, 1.5, 2.999])
def test_the_most_urgent_waits_for_the_chunks_in_flight_only(depth: int, at_chunks: float) -> None:
    link = Link(depth=depth)
    asked_s = at_chunks * link.chunk_s
    with link.device.clock_limit(asked_s) as clock:
        slow = link.load(order=[(0, 56 * MIB)], priority=3)
        clock.reach()
        urgent = link.load(order=[(56 * MIB, 8 * MIB)], priority=0)
    slow.wait(SOON)
    urgent.wait(SOON)
    (copy,) = link.copies_from(56 * MIB)
    waited_s = copy.begin_s - asked_s
    assert waited_s == pytest.approx((int(at_chunks) + depth) * link.chunk_s - asked_s, abs=NS)
    assert waited_s <= depth * link.chunk_s
    # The thread learns of it when the next chunk ends; the rest of the wait is the engine's.
    queued = link.prefetcher.stats().load.queue_waits[0]
    assert queued.max_s == pytest.approx((int(at_chunks) + 1) * link.chunk_s - asked_s, abs=NS)
    link.close()


def test_an_urgent_transfer_keeps_the_others_out_until_its_last_chunk() -> None:
    link = Link()
    with link.device.clock_limit(1.5 * link.chunk_s) as clock:
        slow = link.load(order=[(0, 32 * MIB)], priority=3)
        clock.reach()
        urgent = link.load(order=[(32 * MIB, 32 * MIB)], priority=0)
    slow.wait(SOON)
    urgent.wait(SOON)
    begins = [copy.begin_s for copy in link.copies_from(32 * MIB)]
    assert begins == pytest.approx([(3 + i) * link.chunk_s for i in range(4)], rel=1e-4)
    assert link.copies()[-1].end_s == pytest.approx(8 * link.chunk_s, rel=1e-4)
    link.close()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("at_chunks", [0.25, 1.5, 2.999])
def test_a_cancelled_transfer_ends_with_the_chunks_in_flight(depth: int, at_chunks: float) -> None:
    link = Link(depth=depth)
    asked_s = at_chunks * link.chunk_s
    with link.device.clock_limit(asked_s) as clock:
        ticket = link.load()
        clock.reach()
        ticket.cancel()
    with pytest.raises(ak.TransferCancelled):
        ticket.wait(SOON)
    assert len(link.copies()) == int(at_chunks) + depth, "a chunk was submitted after the cancel"
    latency = link.prefetcher.stats().load.cancel_latencies
    expected = (int(at_chunks) + depth) * link.chunk_s - asked_s
    assert latency.max_s == pytest.approx(expected, abs=NS)
    assert latency.max_s <= depth * link.chunk_s
    link.close()


def test_deadlines_are_kept_where_the_link_can_keep_them() -> None:
    """Earliest deadline first meets all of these; in order of arrival two would be late."""
    link = Link(chunk_bytes=MIB)
    sizes = (30 * MIB, 10 * MIB, 1 * MIB)
    begin = 0
    tickets = []
    with link.device.clock_limit(0.5 * link.chunk_s) as clock:
        first = link.load(order=[(60 * MIB, 4 * MIB)], priority=-1)
        clock.reach()
        for size, due_chunks in zip(sizes, (46, 16, 6), strict=True):
            order = [(begin, size)]
            tickets.append(link.load(order=order, deadline_s=due_chunks * link.chunk_s))
            begin += size
    for ticket in (first, *tickets):
        ticket.wait(SOON)
    stats = link.prefetcher.stats().load
    assert (stats.num_done, stats.num_late) == (4, 0)
    link.close()


RATE = 10e9


def test_a_rate_is_kept_to_the_chunk() -> None:
    link = Link(max_bytes_per_s=RATE)
    link.load().wait(SOON)
    period = 8 * MIB / RATE
    begins = [copy.begin_s for copy in link.copies()]
    assert begins == pytest.approx([i * period for i in range(8)], rel=1e-4)
    stats = link.prefetcher.stats().load
    assert stats.throttled_s == pytest.approx(7 * period, rel=1e-4)
    assert stats.busy_s == pytest.approx(8 * link.chunk_s, rel=1e-4)
    link.close()


@pytest.mark.parametrize("wake_latency_us", [0, 50, 400])
def test_a_rate_is_kept_over_time_by_a_thread_that_wakes_up_late(wake_latency_us: int) -> None:
    """Never more than the rate and two chunks, nor less than the rate and one chunk."""
    link = Link(chunk_bytes=MIB, max_bytes_per_s=RATE, wake_latency_s=wake_latency_us * US, depth=1)
    link.load().wait(SOON)
    begins = np.array([copy.begin_s for copy in link.copies()])
    sent = MIB * np.arange(1, len(begins) + 1)
    for first in range(0, len(begins), 7):
        elapsed = begins[first:] - begins[first]
        bytes_since = sent[first:] - sent[first] + MIB
        assert (bytes_since <= RATE * elapsed + 2 * MIB + 1).all()
    if wake_latency_us < MIB / RATE * 1e6:
        assert begins[-1] <= (len(begins) - 1) * MIB / RATE + link.chunk_s + wake_latency_us * US
    link.close()


def test_a_rate_may_change_while_a_transfer_runs() -> None:
    link = Link(max_bytes_per_s=RATE)
    period = 8 * MIB / RATE
    with link.device.clock_limit(1.5 * period) as clock:
        ticket = link.load()
        clock.reach()
        link.prefetcher.set_rate(load=RATE / 4)
    ticket.wait(SOON)
    begins = [copy.begin_s for copy in link.copies()]
    # What was owed then, half a period, is paid at the new rate.
    expected = [0, period, *(3.5 * period + i * 4 * period for i in range(6))]
    assert begins == pytest.approx(expected, rel=1e-4)
    start = link.device.now_s
    link.prefetcher.set_rate(load=None)
    link.load().wait(SOON)
    assert link.device.now_s - start == pytest.approx(8 * link.chunk_s, rel=1e-4)
    link.close()


def test_each_direction_has_its_own_rate() -> None:
    link = Link()
    link.prefetcher.set_rate(store=RATE)
    with link.device.clock_limit(0):
        store = link.store()
        load = link.load()
    load.wait(SOON)
    store.wait(SOON)
    assert link.copies()[-1].end_s <= 9 * link.chunk_s
    begins = [copy.begin_s for copy in link.copies("memcpy_d2h_async")]
    assert begins[-1] == pytest.approx(7 * 8 * MIB / RATE, abs=link.chunk_s)
    stats = link.prefetcher.stats()
    assert stats.load.throttled_s == 0
    assert stats.store.throttled_s > 0
    link.close()


def test_urgent_classes_may_be_exempt_and_do_not_use_the_rate() -> None:
    period = 8 * MIB / RATE
    link = Link(max_bytes_per_s=RATE, cap_exempt_priority=0)
    asked_s = 1.5 * period
    with link.device.clock_limit(asked_s) as clock:
        slow = link.load(order=[(0, 32 * MIB)], priority=1)
        clock.reach()
        urgent = link.load(order=[(32 * MIB, 32 * MIB)], priority=0)
    slow.wait(SOON)
    urgent.wait(SOON)
    begins = [copy.begin_s for copy in link.copies_from(32 * MIB)]
    assert begins == pytest.approx([asked_s + i * link.chunk_s for i in range(4)], rel=1e-4)
    late_s = asked_s + 4 * link.chunk_s  # the third of the slow ones finds the link taken
    slow_begins = [copy.begin_s for copy in link.copies() if copy not in link.copies_from(32 * MIB)]
    assert slow_begins == pytest.approx([0, period, late_s, 3 * period], rel=1e-4)
    link.close()


def test_a_transfer_that_becomes_urgent_leaves_the_rate_behind() -> None:
    link = Link(max_bytes_per_s=RATE / 100, cap_exempt_priority=0)
    asked_s = 10 * link.chunk_s
    with link.device.clock_limit(asked_s) as clock:
        ticket = link.load(priority=1)
        clock.reach()
        assert ticket.set_priority(0)
    ticket.wait(SOON)
    assert link.copies()[-1].end_s == pytest.approx(asked_s + 7 * link.chunk_s, rel=1e-4)
    link.close()


def test_both_directions_run_at_full_rate_at_once() -> None:
    link = Link(overhead_s=5 * US)
    with link.device.clock_limit(0):
        tickets = link.load(), link.store()
    for ticket in tickets:
        ticket.wait(SOON)
    for call in ("memcpy_h2d_async", "memcpy_d2h_async"):
        copies = link.copies(call)
        assert copies[0].begin_s <= 1.001 * link.chunk_s, "one may find the thread waiting"
        assert copies[-1].end_s - copies[0].begin_s == pytest.approx(8 * link.chunk_s, rel=1e-4)
    link.close()


def test_small_stores_do_not_wait_for_the_large_chunks_of_loads() -> None:
    """128 KiB each way of a chunk of 8 MiB: the thread has to wait for the right one of two."""
    link = Link(wake_latency_s=1 * US)
    num_stores = 300
    size = 128 << 10
    with link.device.clock_limit(0):
        load = link.load()
        stores = [link.store(order=[(i * size, size)]) for i in range(num_stores)]
    load.wait(SOON)
    for store in stores:
        store.wait(SOON)
    small = link.copies("memcpy_d2h_async")
    alone_s = num_stores * size / LINK
    assert small[-1].end_s - small[0].begin_s <= 1.3 * alone_s
    assert link.copies()[-1].end_s <= 8.1 * link.chunk_s
    link.close()


def test_busy_time_and_rate_are_those_of_the_link() -> None:
    link = Link(overhead_s=5 * US)
    link.load().wait(SOON)
    link.device.advance(1.0)
    stats = link.prefetcher.stats().load
    assert stats.busy_s == pytest.approx(8 * link.chunk_s, rel=1e-4)
    assert stats.gb_per_s == pytest.approx(0.968 * LINK / 1e9, rel=1e-3)
    link.close()


def test_an_idle_link_saves_up_one_chunk_of_its_rate() -> None:
    link = Link(max_bytes_per_s=RATE)
    link.load(order=[(0, 8 * MIB)]).wait(SOON)
    link.device.advance(1.0)
    start = link.device.now_s
    link.load(order=[(0, 32 * MIB)]).wait(SOON)
    period = 8 * MIB / RATE
    begins = [copy.begin_s - start for copy in link.copies()[1:]]
    assert begins == pytest.approx([0, link.chunk_s, period, 2 * period], abs=NS)
    link.close()
