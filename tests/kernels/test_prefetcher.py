"""Prefetcher and Ticket: bytes arrive in the order asked for, and every transfer ends one way."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from kernel_support import GRANULE, MIB, DeviceBytes, assert_ledger, open_device
from prefetch_support import CHUNK, SIZE, SOON, TRANSFER_DEVICES, Setup, until

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal


@pytest.fixture(params=TRANSFER_DEVICES)
def device(request: pytest.FixtureRequest) -> FaultyDevice:
    return FaultyDevice(open_device(request.param, request))


def test_a_load_brings_the_image_bit_for_bit(setup: Setup, device_bytes: DeviceBytes) -> None:
    device_bytes.fill(setup.region.address, 0, SIZE)
    ticket = setup.load()
    ticket.wait(SOON)
    assert (ticket.done, ticket.state) == (True, ak.TicketState.DONE)
    assert (ticket.bytes_done, ticket.total_bytes, ticket.error) == (SIZE, SIZE, None)
    assert_bitwise_equal(device_bytes.read(setup.region.address, SIZE), setup.data)
    device_bytes.close()


def test_a_store_brings_the_region_bit_for_bit(setup: Setup, device_bytes: DeviceBytes) -> None:
    device_bytes.write(setup.region.address, setup.data[::-1])
    image = setup.new_image(np.zeros(SIZE, np.uint8))
    setup.prefetcher.store(setup.region, image).wait(SOON)
    assert_bitwise_equal(np.frombuffer(image, np.uint8), setup.data[::-1])
    device_bytes.close()


def test_pieces_may_lie_elsewhere_in_the_image_than_in_the_region(
    setup: Setup, device_bytes: DeviceBytes
) -> None:
    device_bytes.fill(setup.region.address, 170, SIZE)
    # The second touches the first in the region only, the third on both sides.
    order = [
        (500, 8 * CHUNK, 1000),
        (1500, 77, 4096),
        (5596, 4173, 2 * CHUNK),
        (0, 8 * CHUNK, 3),
    ]
    expected = np.full(SIZE, 170, np.uint8)
    for in_region, in_image, size in order:
        expected[in_region : in_region + size] = setup.data[in_image : in_image + size]
    setup.load(order=order).wait(SOON)
    assert_bitwise_equal(device_bytes.read(setup.region.address, SIZE), expected)

    image = setup.new_image(np.zeros(SIZE, np.uint8))
    setup.prefetcher.store(setup.region, image, order=order[:3]).wait(SOON)
    back = np.frombuffer(image, np.uint8)
    for in_region, in_image, size in order[:3]:
        assert_bitwise_equal(
            back[in_image : in_image + size], expected[in_region : in_region + size]
        )
    device_bytes.close()


def test_pieces_may_overlap_only_where_they_are_read(setup: Setup) -> None:
    twice_read = [(0, 0, 100), (100, 50, 100)]
    setup.load(order=twice_read).wait(SOON)
    with pytest.raises(ValueError, match="overlap"):
        setup.prefetcher.store(setup.region, setup.image, order=twice_read)
    twice_written = [(0, 0, 100), (50, 100, 100)]
    with pytest.raises(ValueError, match="overlap"):
        setup.load(order=twice_written)
    setup.prefetcher.store(setup.region, setup.image, order=twice_written).wait(SOON)


@pytest.mark.parametrize("size", [1, 4095, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 12345])
def test_odd_sizes_and_offsets(setup: Setup, device_bytes: DeviceBytes, size: int) -> None:
    offset = 777
    device_bytes.fill(setup.region.address, 170, SIZE)
    setup.load(order=[(offset, size)]).wait(SOON)
    found = device_bytes.read(setup.region.address, SIZE)
    assert_bitwise_equal(found[offset : offset + size], setup.data[offset : offset + size])
    assert (found[:offset] == 170).all()
    assert (found[offset + size :] == 170).all(), "bytes outside the order were written"
    device_bytes.close()


def test_an_image_smaller_than_the_region_loads_its_front(setup: Setup) -> None:
    image = setup.new_image(setup.data[:12345])
    ticket = setup.prefetcher.load(image, setup.region)
    ticket.wait(SOON)
    assert ticket.total_bytes == 12345
    assert setup.offsets() == [(0, 12345)]


def test_pieces_go_in_the_order_given_and_bytes_done_counts_from_its_front(setup: Setup) -> None:
    order = [(5 * CHUNK, CHUNK), (0, 2 * CHUNK), (9 * CHUNK, CHUNK)]
    with setup.device.holding("event_synchronize"):
        ticket = setup.load(order=order)
        until(lambda: len(setup.device.copies) == 2)
        assert ticket.state is ak.TicketState.RUNNING
        assert ticket.bytes_done == 0, "counted before the device was done"
        with pytest.raises(TimeoutError):
            ticket.wait_bytes(1, timeout_s=0.01)
    ticket.wait_bytes(CHUNK, SOON)
    ticket.wait_bytes(3 * CHUNK, SOON)
    assert ticket.bytes_done >= 3 * CHUNK
    ticket.wait(SOON)
    assert setup.offsets() == [
        (5 * CHUNK, CHUNK),
        (0, CHUNK),
        (CHUNK, CHUNK),
        (9 * CHUNK, CHUNK),
    ]


def test_small_pieces_share_chunks_and_touching_ones_a_copy(setup: Setup) -> None:
    kib = 1024
    apart = [(i * 32 * kib, 16 * kib) for i in range(256)]  # 4 MiB in 2 chunks
    setup.load(order=apart).wait(SOON)
    assert setup.device.calls["memcpy_h2d_async"] == 256
    assert setup.device.calls["event_record"] == 2
    setup.device.reset()
    touching = [(i * 16 * kib, 16 * kib) for i in range(256)]
    setup.load(order=touching).wait(SOON)
    assert setup.offsets() == [(0, CHUNK), (CHUNK, CHUNK)]
    stats = setup.prefetcher.stats().load
    assert (stats.bytes, stats.num_chunks, stats.num_copies) == (8 * MIB, 4, 258)


def test_the_most_urgent_goes_next_at_every_chunk(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        setup.load(order=[(0, 3 * CHUNK)], priority=5)
        until(lambda: setup.device.copies)  # its first chunk is on the way
        setup.load(order=[(4 * CHUNK, CHUNK)], priority=7)
        setup.load(order=[(5 * CHUNK, CHUNK)], priority=-1)
        setup.load(order=[(6 * CHUNK, CHUNK)], priority=5)
        last = setup.load(order=[(7 * CHUNK, CHUNK)], priority=7)
    last.wait(SOON)
    expected = [0, 5, 1, 2, 6, 4, 7]
    assert [offset // CHUNK for offset, _ in setup.offsets()] == expected
    waits = setup.prefetcher.stats().load.queue_waits
    assert {priority: wait.num for priority, wait in waits.items()} == {-1: 1, 5: 2, 7: 2}
    assert all(
        0 <= wait.p50_s <= wait.p99_s <= wait.max_s <= wait.total_s for wait in waits.values()
    )


def test_no_more_chunks_in_flight_than_the_depth(setup: Setup) -> None:
    with setup.device.holding("event_synchronize"):
        ticket = setup.load()
        until(lambda: setup.device.calls.get("event_synchronize"))
        time.sleep(0.02)
        assert len(setup.device.copies) == 2
    ticket.wait(SOON)


def test_loads_and_stores_share_the_prefetcher(setup: Setup, device_bytes: DeviceBytes) -> None:
    other = setup.arena.reserve(SIZE, owner="b")
    other.map()
    device_bytes.write(other.address, setup.data[::-1])
    out = setup.new_image(np.zeros(SIZE, np.uint8))
    store = setup.prefetcher.store(other, out)
    load = setup.load()
    load.wait(SOON)
    store.wait(SOON)
    assert_bitwise_equal(np.frombuffer(out, np.uint8), setup.data[::-1])
    assert_bitwise_equal(device_bytes.read(setup.region.address, SIZE), setup.data)
    stats = setup.prefetcher.stats()
    assert (stats.load.bytes, stats.store.bytes) == (SIZE, SIZE)
    assert stats.load.gb_per_s > 0
    assert stats.store.gb_per_s > 0
    device_bytes.close()


def test_cancelling_a_queued_transfer_ends_it_at_once(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        first = setup.load(order=[(0, CHUNK)])
        queued = setup.load(order=[(CHUNK, CHUNK)], priority=1)
        until(lambda: first.state is ak.TicketState.RUNNING)
        assert queued.cancel()
        assert queued.state is ak.TicketState.CANCELLED
        with pytest.raises(ak.TransferCancelled, match="after 0 of"):
            queued.wait(0.01)
    first.wait(SOON)
    assert not queued.done
    assert setup.offsets() == [(0, CHUNK)]


def test_cancelling_a_running_transfer_stops_after_the_chunks_in_flight(setup: Setup) -> None:
    with setup.device.holding("event_synchronize"):
        ticket = setup.load()
        until(lambda: setup.device.calls.get("event_synchronize"))
        assert ticket.cancel()
        assert ticket.state is ak.TicketState.DRAINING
        with pytest.raises(ak.LifecycleError, match="in flight"):
            setup.region.unmap()
    with pytest.raises(ak.TransferCancelled):
        ticket.wait(SOON)
    assert ticket.state is ak.TicketState.CANCELLED
    assert isinstance(ticket.error, ak.TransferCancelled)
    assert len(setup.device.copies) == 2, "within two chunks"
    assert ticket.cancel(), "it is cancelled, as before"
    setup.region.unmap()


def test_a_transfer_cancelled_after_its_last_chunk_is_not_done(setup: Setup) -> None:
    with setup.device.holding("event_synchronize"):
        ticket = setup.load(order=[(0, CHUNK)])
        until(lambda: setup.device.calls.get("event_synchronize"))
        assert ticket.cancel()
    with pytest.raises(ak.TransferCancelled):
        ticket.wait(SOON)
    assert not ticket.done


def test_cancelling_a_transfer_that_waits_between_its_chunks(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        low = setup.load(priority=1)
        until(lambda: setup.device.copies)
        high = setup.load(order=[(0, 8 * CHUNK)], priority=0)
    until(lambda: high.bytes_done >= 4 * CHUNK)
    low.cancel()
    with pytest.raises(ak.TransferCancelled):
        low.wait(SOON)
    high.wait(SOON)


def test_a_finished_transfer_cannot_be_cancelled(setup: Setup) -> None:
    ticket = setup.load(order=[(0, CHUNK)])
    ticket.wait(SOON)
    assert not ticket.cancel()
    assert ticket.done


def test_a_timeout_leaves_the_transfer_running(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        ticket = setup.load()
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            ticket.wait(0.05)
        assert 0.05 <= time.monotonic() - begin < SOON
        with pytest.raises(TimeoutError):
            ticket.wait(0)
    ticket.wait(SOON)


def test_a_region_in_flight_is_neither_unmapped_nor_closed(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        ticket = setup.load(order=[(0, CHUNK)])
        for operation in (setup.region.unmap, setup.region.close, setup.arena.close):
            with pytest.raises(ak.LifecycleError, match=r"1 transfer.* in flight"):
                operation()
        assert setup.region.mapped_bytes == SIZE
    ticket.wait(SOON)
    setup.region.unmap()  # at once: the end shows only after the hold is gone


def test_who_sees_the_end_may_unmap_at_once(setup: Setup) -> None:
    for _ in range(200):
        setup.load(order=[(0, 4096)]).wait(SOON)
        setup.region.unmap()
        setup.region.map()


def test_a_ticket_keeps_image_and_region(device: FaultyDevice) -> None:
    setup = Setup(device)
    with device.holding("memcpy_h2d_async"):
        ticket = setup.load()
        del setup.image, setup.region
        assert device.live["host_allocations"] == 1
        assert device.live["mappings"] == SIZE // (4 * GRANULE)
    ticket.wait(SOON)
    until(lambda: "mappings" not in device.live)
    assert "host_allocations" not in device.live
    assert assert_ledger(setup.arena).owners == {}
    setup.prefetcher.close()
    setup.arena.close()
    assert device.live == {}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([], "empty"),
        ([(0, 0)], "empty or outside"),
        ([(SIZE, 1)], "outside"),
        ([(SIZE - 1, 2)], "outside"),
        ([(-1, 2)], "negative"),
        ([(0, -1)], "negative"),
        ([(0, 100), (99, 1)], "overlap"),
        ([(50, 10), (0, 100)], "overlap"),
        ([(0, 1 << 63)], "outside"),
        ([(0, SIZE, 1)], "outside"),
        ([(SIZE, 0, 1)], "outside"),
        ([(0, 1 << 63, 1 << 63)], "outside"),
        ([(0, -1, 1)], "negative"),
    ],
)
def test_bad_orders_are_the_callers_mistake(
    setup: Setup, order: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        setup.load(order=order)
    with pytest.raises(ValueError, match=message):
        setup.prefetcher.store(setup.region, setup.image, order=order)
    assert setup.device.copies == []
    setup.region.unmap()


def test_an_image_larger_than_the_region_needs_an_order(setup: Setup) -> None:
    image = ak.HostImage.allocate(SIZE + 1, device=setup.device)
    with pytest.raises(ValueError, match="outside"):
        setup.prefetcher.load(image, setup.region)
    setup.prefetcher.load(image, setup.region, order=[(0, SIZE)]).wait(SOON)


def test_only_mapped_parts_take_part(setup: Setup) -> None:
    setup.region.unmap(4 * GRANULE, 4 * GRANULE)
    with pytest.raises(ak.LifecycleError, match="not mapped"):
        setup.load()
    with pytest.raises(ak.LifecycleError, match="not mapped"):
        setup.load(order=[(0, 100), (4 * GRANULE - 1, 2)])
    setup.load(order=[(8 * GRANULE, 8 * GRANULE), (0, 4 * GRANULE)]).wait(SOON)
    setup.region.unmap()
    with pytest.raises(ak.LifecycleError, match="not mapped"):
        setup.load(order=[(0, 1)])
    setup.region.close()
    with pytest.raises(ak.LifecycleError, match="closed"):
        setup.load(order=[(0, 1)])


def test_a_sealed_image_takes_no_store(setup: Setup) -> None:
    with setup.device.holding("memcpy_d2h_async"):
        ticket = setup.prefetcher.store(setup.region, setup.image)
        with pytest.raises(ak.LifecycleError, match="in flight"):
            setup.image.seal()
    ticket.wait(SOON)
    setup.image.seal()
    with pytest.raises(ak.LifecycleError, match="sealed"):
        setup.prefetcher.store(setup.region, setup.image)
    setup.load().wait(SOON)
    setup.image.verify()


def test_a_region_of_another_device_is_refused(setup: Setup) -> None:
    with (
        ak.Prefetcher(ak.Device("host", memory_bytes=GRANULE)) as other,
        pytest.raises(ValueError, match="another device"),
    ):
        other.load(setup.image, setup.region)


@pytest.mark.parametrize(("chunk_bytes", "depth"), [(0, 2), (-1, 2), (1, 0), (1, -1)])
def test_bad_settings_are_the_callers_mistake(
    host: FaultyDevice, chunk_bytes: int, depth: int
) -> None:
    with pytest.raises(ValueError, match="positive"):
        ak.Prefetcher(host, chunk_bytes=chunk_bytes, depth=depth)


def test_bad_waits_are_the_callers_mistake(setup: Setup) -> None:
    ticket = setup.load()
    for num_bytes in (-1, SIZE + 1):
        with pytest.raises(ValueError, match="num_bytes"):
            ticket.wait_bytes(num_bytes)
    ticket.wait_bytes(0)
    ticket.wait(SOON)


def test_close_cancels_what_is_queued_and_drains_what_is_not(setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        running = setup.load()
        queued = [setup.load(order=[(0, 1)]) for _ in range(3)]
        until(lambda: setup.device.copies)
        closer = threading.Thread(target=setup.prefetcher.close)
        closer.start()
        until(lambda: queued[-1].state is ak.TicketState.CANCELLED)
    closer.join(SOON)
    assert not closer.is_alive()
    assert running.state is ak.TicketState.CANCELLED
    assert all(ticket.state is ak.TicketState.CANCELLED for ticket in queued)
    with pytest.raises(ak.LifecycleError, match="closed"):
        setup.load()
    setup.prefetcher.close()


def test_a_dropped_prefetcher_ends_its_thread(device: FaultyDevice) -> None:
    setup = Setup(device)
    ticket = setup.load()
    del setup.prefetcher
    assert ticket.state in (ak.TicketState.CANCELLED, ak.TicketState.DONE)
    setup.arena.close()
    del setup.image
    assert device.live == {}


def test_a_failed_copy_ends_its_transfer_and_no_other(
    setup: Setup, device_bytes: DeviceBytes
) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        before = setup.load(order=[(0, CHUNK)])
        until(lambda: setup.device.copies)
        setup.device.fail_call(4, call="memcpy_h2d_async", code=700)  # 1 is being held
        failing = setup.load(order=[(4 * CHUNK, 8 * CHUNK)])
        after = setup.load(order=[(2 * CHUNK, CHUNK)])
    with pytest.raises(ak.DriverError) as caught:
        failing.wait(SOON)
    assert (caught.value.call, caught.value.code) == ("memcpy_h2d_async", 700)
    assert failing.state is ak.TicketState.FAILED
    assert not failing.done
    assert failing.bytes_done == 2 * CHUNK, "the chunks before the failed one arrived"
    assert isinstance(failing.error, ak.DriverError)
    with pytest.raises(ak.DriverError):
        failing.wait_bytes(4 * CHUNK)
    failing.wait_bytes(2 * CHUNK)
    before.wait(SOON)
    after.wait(SOON)
    found = device_bytes.read(setup.region.address + 2 * CHUNK, CHUNK)
    assert_bitwise_equal(found, setup.data[2 * CHUNK : 3 * CHUNK])
    setup.region.unmap()
    device_bytes.close()


def test_memory_stays_while_the_device_does_not_say_that_a_copy_is_over(setup: Setup) -> None:
    setup.device.fail_call(1, call="stream_synchronize", persistent=True)
    with setup.device.holding("memcpy_h2d_async"):
        ticket = setup.load(order=[(0, CHUNK)])
        until(lambda: setup.device.copies)
        setup.device._faulty.fail_call(n=1, call=None, code=700, persistent=True)
    with pytest.raises(ak.DriverError):
        ticket.wait(SOON)
    with pytest.raises(ak.LifecycleError, match="in flight"):
        setup.region.unmap()
    setup.device.reset()
    until(lambda: _unmapped(setup.region))
    setup.region.map()
    setup.load().wait(SOON)


def _unmapped(region: ak.Region) -> bool:
    try:
        region.unmap()
    except ak.LifecycleError:
        return False
    return True


def test_many_threads_submit_wait_and_cancel(setup: Setup) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(100):
                offset = int(random.integers(0, SIZE - 1))
                size = int(random.integers(1, min(SIZE - offset, 2 * CHUNK) + 1))
                ticket = setup.load(order=[(offset, size)], priority=int(random.integers(3)))
                if random.random() < 0.3:
                    ticket.cancel()
                try:
                    ticket.wait(SOON)
                except ak.TransferCancelled:
                    assert not ticket.done
                else:
                    assert ticket.bytes_done == size
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    setup.region.unmap()


def test_a_small_load_costs_little_over_its_copy(host: FaultyDevice) -> None:
    setup = Setup(host)
    order = [(0, 4096)]
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        setup.load(order=order).wait(SOON)
        times.append(time.perf_counter() - begin)
    # Twenty microseconds on an idle machine; a sleep or a poll would show as a millisecond.
    assert sorted(times)[len(times) // 4] < 0.001
    setup.close()
