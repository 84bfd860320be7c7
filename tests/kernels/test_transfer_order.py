"""Parts of a transfer: layers and ranges, and which transfer the next chunk is of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DeviceBytes, open_device, pattern
from prefetch_support import CHUNK, SIZE, SOON, TRANSFER_DEVICES, Setup, until

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal


@pytest.fixture(params=TRANSFER_DEVICES)
def device(request: pytest.FixtureRequest) -> FaultyDevice:
    return FaultyDevice(open_device(request.param, request))


LAYERS = [
    [(8 * CHUNK, CHUNK), (100, 900)],  # a chunk, and the beginning of a second one
    (3 * CHUNK, 2 * CHUNK - 900),
    [(CHUNK, 10), (CHUNK + 10, 10), (7 * CHUNK, CHUNK - 20)],
]


def test_every_entry_of_the_order_is_a_layer(setup: Setup, device_bytes: DeviceBytes) -> None:
    device_bytes.fill(setup.region.address, 0, SIZE)
    with setup.device.holding("event_synchronize"):
        ticket = setup.load(order=LAYERS)
        assert ticket.num_layers == 3
        assert not any(ticket.layer_done(i) for i in range(3))
        with pytest.raises(TimeoutError):
            ticket.wait_layer(0, timeout_s=0.01)
    ticket.wait_layer(0, SOON)
    assert ticket.layer_done(0)
    found = device_bytes.read(setup.region.address, SIZE)
    for offset, size in LAYERS[0]:
        assert_bitwise_equal(found[offset : offset + size], setup.data[offset : offset + size])
    ticket.wait_layer(2, SOON)
    assert ticket.bytes_done == ticket.total_bytes == 4 * CHUNK
    assert all(ticket.layer_done(i) for i in range(3))
    device_bytes.close()


def test_without_an_order_the_image_is_one_layer(setup: Setup) -> None:
    ticket = setup.load()
    ticket.wait_layer(0, SOON)
    assert (ticket.num_layers, ticket.bytes_done) == (1, SIZE)


def test_layers_that_are_not_there_are_the_callers_mistake(setup: Setup) -> None:
    ticket = setup.load(order=LAYERS)
    for layer_idx in (-1, 3):
        with pytest.raises(ValueError, match=r"within 0\.\.2"):
            ticket.layer_done(layer_idx)
        with pytest.raises(ValueError, match=r"within 0\.\.2"):
            ticket.wait_layer(layer_idx)
    with pytest.raises(ValueError, match="has none"):
        setup.load(order=[(0, 1), []])
    ticket.wait(SOON)


def test_a_layer_that_will_not_arrive_raises_and_one_that_has_does_not(setup: Setup) -> None:
    setup.device.fail_call(2, call="memcpy_h2d_async", code=700)
    ticket = setup.load(order=[(0, CHUNK), (4 * CHUNK, CHUNK)])
    with pytest.raises(ak.DriverError):
        ticket.wait_layer(1, SOON)
    ticket.wait_layer(0, SOON)
    assert ticket.layer_done(0)
    assert not ticket.layer_done(1), "a failed copy counts as arrived"
    assert ticket.ranges_done() == [(0, CHUNK)]
    with pytest.raises(ak.DriverError):
        ticket.wait_range(4 * CHUNK, 1)


def test_ranges_done_are_what_has_arrived_where_it_was_written(setup: Setup) -> None:
    order = [(4 * CHUNK, 0, CHUNK), (5 * CHUNK, 2 * CHUNK, CHUNK), (CHUNK, 9 * CHUNK, CHUNK)]
    with setup.device.holding("event_synchronize"):
        load = setup.load(order=order)
        assert load.ranges_done() == []
    load.wait(SOON)
    assert load.ranges_done() == [(CHUNK, CHUNK), (4 * CHUNK, 2 * CHUNK)]
    image = setup.new_image(np.zeros(SIZE, np.uint8))
    store = setup.prefetcher.store(setup.region, image, order=order)
    store.wait(SOON)
    assert store.ranges_done() == [(0, CHUNK), (2 * CHUNK, CHUNK), (9 * CHUNK, CHUNK)]


def test_waiting_for_a_range_waits_for_the_pieces_that_bring_it(setup: Setup) -> None:
    order = [(5 * CHUNK, CHUNK), (0, CHUNK), (6 * CHUNK, CHUNK), (9 * CHUNK, CHUNK)]
    with setup.device.holding("event_synchronize"):
        ticket = setup.load(order=order)
        ticket.wait_range(0, 0)  # nothing to wait for
        with pytest.raises(TimeoutError):
            ticket.wait_range(5 * CHUNK, 1, timeout_s=0.01)
    ticket.wait_range(5 * CHUNK + 100, CHUNK, SOON)  # of the first and the third
    assert ticket.bytes_done >= 3 * CHUNK
    ticket.wait(SOON)
    for offset, size in [(4 * CHUNK, CHUNK + 1), (CHUNK - 1, 2), (9 * CHUNK, CHUNK + 1), (SIZE, 1)]:
        with pytest.raises(ValueError, match="not part of the order"):
            ticket.wait_range(offset, size)
    with pytest.raises(ValueError, match="negative"):
        ticket.wait_range(-1, 2)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranges_and_prefixes_agree(data: st.DataObject) -> None:
    """bytes_through(range) is the least prefix whose ranges_within() contain the range."""
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=8))
    gaps = data.draw(st.lists(st.integers(0, 20), min_size=len(sizes), max_size=len(sizes)))
    offsets = np.cumsum(gaps) + np.cumsum([0, *sizes[:-1]])
    pieces = [(int(offset), size) for offset, size in zip(offsets, sizes, strict=True)]
    order = data.draw(st.permutations(pieces))
    device = ak.Device("host", memory_bytes=4 << 20)
    with ak.Arena(device, capacity_bytes=4 << 20) as arena, ak.Prefetcher(device) as prefetcher:
        region = arena.reserve(4 << 20, owner="a")
        region.map()
        ticket = prefetcher.load(ak.HostImage.allocate(1 << 20, device=device), region, order=order)
        ticket.wait(SOON)
        position = {}  # of each byte, in the order
        for offset, size in order:
            for byte in range(offset, offset + size):
                position[byte] = len(position) + 1
        begin = data.draw(st.sampled_from(sorted(position)))
        end = begin
        while end in position:
            end += 1
        size = data.draw(st.integers(1, end - begin))
        needed = ticket._ticket.bytes_through(offset_bytes=begin, size_bytes=size)
        assert needed == max(position[byte] for byte in range(begin, begin + size))
        with pytest.raises(ValueError, match=f"offset {end}"):
            ticket._ticket.bytes_through(offset_bytes=begin, size_bytes=end - begin + 1)
        assert sum(size for _, size in ticket.ranges_done()) == sum(sizes)
        assert ticket.ranges_done() == sorted(ticket.ranges_done())


def blocked(setup: Setup) -> ak.Ticket:
    """A transfer whose first chunk is on its way to the device, so that others queue up."""
    ticket = setup.load(order=[(0, CHUNK)], priority=-100)
    until(lambda: setup.device.copies)
    return ticket


def order_of_arrival(setup: Setup) -> list[int]:
    return [offset // CHUNK for offset, _ in setup.offsets()]


def test_within_a_priority_the_earliest_deadline_goes_first(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        blocked(setup)
        tickets = [
            setup.load(order=[(CHUNK, CHUNK)]),
            setup.load(order=[(2 * CHUNK, CHUNK)], deadline_s=5.0),
            setup.load(order=[(3 * CHUNK, CHUNK)], deadline_s=-1.0),
            setup.load(order=[(4 * CHUNK, CHUNK)], deadline_s=math.inf),
            setup.load(order=[(5 * CHUNK, CHUNK)], deadline_s=1.0),
            setup.load(order=[(6 * CHUNK, CHUNK)], priority=-1),
        ]
    for ticket in tickets:
        ticket.wait(SOON)
    assert order_of_arrival(setup) == [0, 6, 3, 5, 2, 4, 1]
    stats = setup.prefetcher.stats().load
    assert (stats.num_done, stats.num_late) == (7, 1), "one was due before it began"


def test_a_priority_may_change_while_a_transfer_waits_and_while_it_runs(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        running = setup.load(order=[(0, 3 * CHUNK)], priority=1)
        until(lambda: setup.device.copies)
        queued = setup.load(order=[(4 * CHUNK, CHUNK)], priority=2)
        other = setup.load(order=[(5 * CHUNK, CHUNK)], priority=2)
        assert running.set_priority(3)
        assert other.set_priority(-7)
        assert (running.priority, queued.priority, other.priority) == (3, 2, -7)
    running.wait(SOON)
    assert order_of_arrival(setup) == [0, 5, 4, 1, 2]
    assert not running.set_priority(0), "nothing of it is left to go"
    assert not running.set_deadline(0.0)


def test_a_deadline_may_change_too(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        blocked(setup)
        first = setup.load(order=[(CHUNK, CHUNK)], deadline_s=1.0)
        second = setup.load(order=[(2 * CHUNK, CHUNK)], deadline_s=2.0)
        third = setup.load(order=[(3 * CHUNK, CHUNK)], deadline_s=3.0)
        assert third.set_deadline(0.5)
        assert first.set_deadline(None)
    for ticket in (first, second, third):
        ticket.wait(SOON)
    assert order_of_arrival(setup) == [0, 3, 2, 1]


def test_what_is_not_a_number_is_no_deadline(setup: Setup) -> None:
    with pytest.raises(ValueError, match="deadline_s"):
        setup.load(deadline_s=math.nan)
    ticket = setup.load()
    with pytest.raises(ValueError, match="deadline_s"):
        ticket.set_deadline(math.nan)
    ticket.wait(SOON)


def test_the_chunk_size_may_change_while_a_transfer_runs(setup: Setup) -> None:
    with setup.device.holding("event_synchronize"):
        ticket = setup.load()
        until(lambda: len(setup.device.copies) == 2)
        setup.prefetcher.set_chunk_bytes(3 * CHUNK)
    ticket.wait(SOON)
    sizes = [size // CHUNK for _, size in setup.offsets()]
    assert sizes == [1, 1, 3, 3, 3, 3, 2]
    for chunk_bytes in (0, -1):
        with pytest.raises(ValueError, match="positive"):
            setup.prefetcher.set_chunk_bytes(chunk_bytes)


def test_rates_below_one_byte_a_second_are_the_callers_mistake(
    setup: Setup, host: FaultyDevice
) -> None:
    for rate in (0, -1.0, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate"):
            setup.prefetcher.set_rate(load=rate)
        with pytest.raises(ValueError, match="rate"):
            ak.Prefetcher(host, max_bytes_per_s=rate)


def test_a_throttled_transfer_is_cancelled_and_closed_at_once(host: FaultyDevice) -> None:
    setup = Setup(host)
    setup.prefetcher.set_rate(load=1.0, store=1.0)  # a chunk in 24 days
    ticket = setup.load()
    ticket.wait_bytes(CHUNK, SOON)
    ticket.cancel()
    with pytest.raises(ak.TransferCancelled):
        ticket.wait(SOON)
    second = setup.load()
    setup.prefetcher.close()
    assert second.state is ak.TicketState.CANCELLED
    assert setup.prefetcher.stats().load.throttled_s > 0
    setup.close()


def test_every_transfer_is_counted_once_by_how_it_ended(setup: Setup) -> None:
    done = [setup.load(order=[(0, CHUNK)]) for _ in range(3)]
    for ticket in done:
        ticket.wait(SOON)
    with setup.device.holding("memcpy_h2d_async"):
        running = setup.load()
        until(lambda: running.state is ak.TicketState.RUNNING)
        queued = setup.load(priority=9)
        queued.cancel()
        running.cancel()
    with pytest.raises(ak.TransferCancelled):
        running.wait(SOON)
    setup.device.fail_call(1, call="memcpy_h2d_async")
    with pytest.raises(ak.DriverError):
        setup.load().wait(SOON)
    image = setup.new_image(pattern(CHUNK, seed=1))
    setup.prefetcher.store(setup.region, image).wait(SOON)
    stats = setup.prefetcher.stats()
    assert (stats.load.num_done, stats.load.num_cancelled, stats.load.num_failed) == (3, 2, 1)
    assert (stats.store.num_done, stats.store.num_cancelled, stats.store.num_failed) == (1, 0, 0)
    assert stats.load.cancel_latencies.num == 1, "only the running one took time to end"
