"""Transfers and other work of the device: after= and Ticket.wait_on_stream()."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from kernel_support import DeviceBytes, open_device
from prefetch_support import CHUNK, SIZE, SOON, TRANSFER_DEVICES, Setup, until

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice, SimulatedDevice, assert_bitwise_equal


@pytest.fixture(params=TRANSFER_DEVICES)
def device(request: pytest.FixtureRequest) -> FaultyDevice:
    return FaultyDevice(open_device(request.param, request))


@pytest.fixture
def stream(setup: Setup) -> Iterator[int]:
    code, stream = setup.device._driver.stream_create()
    assert code == 0
    yield stream
    assert setup.device._driver.stream_destroy(stream) == 0


def fill(device: FaultyDevice, address: int, value: int, size: int, stream: int) -> None:
    assert device._driver.memset_async(address, value, size, stream) == 0


def read_on(device: FaultyDevice, address: int, size: int, stream: int) -> npt.NDArray[np.uint8]:
    """What work on this stream sees."""
    data = np.zeros(size, np.uint8)
    assert device._driver.memcpy_d2h_async(data.ctypes.data, address, size, stream) == 0
    assert device._driver.stream_synchronize(stream) == 0
    return data


def test_a_stream_that_waits_sees_the_bytes(stream: int, setup: Setup) -> None:
    for layer, (offset, size) in enumerate(order := [(i * CHUNK, CHUNK) for i in range(8)]):
        if layer == 0:
            ticket = setup.load(order=order)
        ticket.wait_on_stream(stream, layer=layer, timeout_s=SOON)
        found = read_on(setup.device, setup.region.address + offset, size, stream)
        assert_bitwise_equal(found, setup.data[offset : offset + size])
    ticket.wait_on_stream(stream, timeout_s=SOON)
    ticket.wait(SOON)


def test_a_stream_may_wait_for_bytes_that_have_arrived(stream: int, setup: Setup) -> None:
    ticket = setup.load()
    ticket.wait(SOON)
    ticket.wait_on_stream(stream)
    ticket.wait_on_stream(stream, num_bytes=0)
    assert "stream_wait_event" not in setup.device.calls, "there is nothing to wait for"


def test_a_stream_that_waits_for_a_store_may_overwrite_what_was_stored(
    stream: int, setup: Setup, device_bytes: DeviceBytes
) -> None:
    device_bytes.write(setup.region.address, setup.data)
    image = setup.new_image(np.zeros(SIZE, np.uint8))
    ticket = setup.prefetcher.store(setup.region, image)
    ticket.wait_on_stream(stream, timeout_s=SOON)
    fill(setup.device, setup.region.address, 255, SIZE, stream)
    assert setup.device._driver.stream_synchronize(stream) == 0
    ticket.wait(SOON)
    assert_bitwise_equal(np.frombuffer(image, np.uint8), setup.data)
    device_bytes.close()


def test_the_host_waits_until_the_copies_are_with_the_device(stream: int, setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        ticket = setup.load(order=[(0, 3 * CHUNK)])
        with pytest.raises(TimeoutError, match="to be at"):
            ticket.wait_on_stream(stream, num_bytes=1, timeout_s=0.01)
    ticket.wait(SOON)
    with setup.device.holding("event_synchronize"):
        other = setup.load(order=[(4 * CHUNK, 4 * CHUNK)])
        other.wait_on_stream(stream, num_bytes=2 * CHUNK, timeout_s=SOON)
        assert other.bytes_done == 0, "it waited for the copies themselves"
        with pytest.raises(TimeoutError):
            other.wait_on_stream(stream, num_bytes=2 * CHUNK + 1, timeout_s=0.01)
    other.wait(SOON)


def test_a_stream_does_not_wait_for_what_will_not_come(stream: int, setup: Setup) -> None:
    setup.device.fail_call(2, call="memcpy_h2d_async", code=700)
    failing = setup.load(order=[(0, 2 * CHUNK)])
    with pytest.raises(ak.DriverError) as caught:
        failing.wait_on_stream(stream, timeout_s=SOON)
    assert caught.value.call == "memcpy_h2d_async"
    failing.wait_on_stream(stream, num_bytes=CHUNK, timeout_s=SOON)
    with setup.device.holding("memcpy_h2d_async"):
        setup.load(order=[(0, 1)])
        cancelled = setup.load()
        cancelled.cancel()
        with pytest.raises(ak.TransferCancelled):
            cancelled.wait_on_stream(stream, timeout_s=SOON)


def test_a_refused_wait_raises_and_the_transfer_goes_on(stream: int, setup: Setup) -> None:
    setup.device.fail_call(1, call="stream_wait_event", code=400)
    with setup.device.holding("event_synchronize"):
        ticket = setup.load(order=[(0, CHUNK)])
        with pytest.raises(ak.DriverError) as caught:
            ticket.wait_on_stream(stream, timeout_s=SOON)
    assert (caught.value.call, caught.value.code) == ("stream_wait_event", 400)
    ticket.wait(SOON)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bytes": -1}, "within 0"),
        ({"num_bytes": SIZE + 1}, "within 0"),
        ({"layer": 1}, r"within 0\.\.0"),
        ({"layer": 0, "num_bytes": 1}, "not both"),
    ],
)
def test_bad_parts_are_the_callers_mistake(
    stream: int, setup: Setup, arguments: dict[str, int], message: str
) -> None:
    ticket = setup.load()
    with pytest.raises(ValueError, match=message):
        ticket.wait_on_stream(stream, **arguments)
    ticket.wait(SOON)


def test_a_load_after_a_stream_waits_for_what_is_on_it(
    stream: int, setup: Setup, device_bytes: DeviceBytes
) -> None:
    for _ in range(20):
        fill(setup.device, setup.region.address, 170, SIZE, stream)
        setup.load(after=stream).wait(SOON)
        assert setup.device._driver.stream_synchronize(stream) == 0  # a late fill would show
        assert_bitwise_equal(device_bytes.read(setup.region.address, SIZE), setup.data)
    device_bytes.close()


def test_a_store_after_a_stream_brings_what_the_stream_wrote(stream: int, setup: Setup) -> None:
    for value in range(20):
        image = setup.new_image(np.full(SIZE, 255, np.uint8))
        fill(setup.device, setup.region.address, value, SIZE, stream)
        setup.prefetcher.store(setup.region, image, after=stream).wait(SOON)
        assert (np.frombuffer(image, np.uint8) == value).all()


def test_a_transfer_that_waits_for_a_stream_lets_others_go_first(stream: int, setup: Setup) -> None:
    with setup.device.holding("event_query"):
        gated = setup.load(after=stream, order=[(0, CHUNK)], priority=-1)
        assert gated.state is ak.TicketState.QUEUED
        assert setup.device.copies == []
    gated.wait(SOON)
    setup.device.fail_call(1, call="event_query", code=600, persistent=True)  # not ready
    gated = setup.load(after=stream, order=[(0, CHUNK)], priority=-1)
    for _ in range(3):
        setup.load(order=[(CHUNK, CHUNK)], priority=1).wait(SOON)
    assert gated.state is ak.TicketState.QUEUED
    assert gated.set_priority(5)
    assert gated.priority == 5
    setup.device.reset()
    gated.wait(SOON)
    assert set(setup.prefetcher.stats().load.queue_waits) == {-1, 1, 5}


def test_a_transfer_that_waits_for_a_stream_can_be_cancelled(stream: int, setup: Setup) -> None:
    setup.device.fail_call(1, call="event_query", code=600, persistent=True)
    gated = setup.load(after=stream)
    gated.cancel()
    assert gated.state is ak.TicketState.CANCELLED
    setup.region.unmap()  # at once
    setup.region.map()
    left = setup.load(after=stream)
    setup.prefetcher.close()
    assert left.state is ak.TicketState.CANCELLED
    setup.device.reset()


def test_a_stream_that_fails_fails_what_waits_for_it(stream: int, setup: Setup) -> None:
    setup.device.fail_call(1, call="event_query", code=719)
    gated = setup.load(after=stream)
    with pytest.raises(ak.DriverError) as caught:
        gated.wait(SOON)
    assert (caught.value.call, caught.value.code) == ("event_query", 719)
    assert gated.bytes_done == 0
    assert setup.device.copies == []


@pytest.mark.parametrize("call", ["stream_is_capturing", "event_create", "event_record"])
def test_a_refused_gate_leaves_nothing_behind(stream: int, setup: Setup, call: str) -> None:
    live = setup.device.live
    setup.device.fail_call(1, call=call)
    with pytest.raises(ak.DriverError) as caught:
        setup.load(after=stream)
    assert caught.value.call == call
    assert setup.device.live == live
    setup.region.unmap()


def test_a_stream_in_capture_is_refused(stream: int, setup: Setup) -> None:
    with setup.device.holding("event_synchronize"):
        ticket = setup.load()
        with setup.device.capturing():
            with pytest.raises(ak.LifecycleError, match="captured"):
                setup.load(after=stream)
            with pytest.raises(ak.LifecycleError, match="captured"):
                ticket.wait_on_stream(stream, num_bytes=CHUNK, timeout_s=SOON)
        assert "stream_wait_event" not in setup.device.calls
    ticket.wait(SOON)


def test_streams_of_other_libraries_are_understood(stream: int, setup: Setup) -> None:
    class OfTorch:
        cuda_stream = stream

    class OfCupy:
        ptr = stream

    class OfTheProtocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, stream

    for known in (OfTorch(), OfCupy(), OfTheProtocol(), stream):
        setup.load(after=known).wait_on_stream(known, timeout_s=SOON)
    for unknown in ("0", None, True, object()):
        with pytest.raises(ValueError, match="not a stream"):
            setup.load().wait_on_stream(unknown, timeout_s=SOON)


def test_a_device_that_stops_answering_fails_all_that_is_queued(stream: int, setup: Setup) -> None:
    with setup.device.holding("memcpy_h2d_async"):
        running = setup.load()
        until(lambda: setup.device.copies)
        setup.prefetcher.set_rate(store=1.0)
        image = setup.new_image(np.zeros(SIZE, np.uint8))
        tickets = [
            running,
            setup.load(priority=1),
            setup.prefetcher.store(setup.region, image),
            setup.prefetcher.store(setup.region, image),
        ]
        setup.device.fail_call(1, code=719, persistent=True)
        until(lambda: len(setup.device.copies) == 1)
    for ticket in tickets:
        with pytest.raises(ak.DriverError) as caught:
            ticket.wait(SOON)
        assert caught.value.code == 719
        assert ticket.state is ak.TicketState.FAILED
    stats = setup.prefetcher.stats()
    assert stats.load.num_failed + stats.store.num_failed == 4
    setup.device.reset()
    until(lambda: not _in_use(setup.region))
    setup.region.map()
    setup.prefetcher.set_rate(store=None)
    setup.load().wait(SOON)


def _in_use(region: ak.Region) -> bool:
    try:
        region.unmap()
    except ak.LifecycleError:
        return True
    return False


@pytest.fixture
def simulated() -> SimulatedDevice:
    """A chunk takes a millisecond."""
    return SimulatedDevice(memory_bytes=1 << 30, bytes_per_s=CHUNK * 1e3)


def test_a_first_layer_runs_before_the_last_has_arrived(simulated: SimulatedDevice) -> None:
    setup = Setup(FaultyDevice(simulated))
    code, stream = simulated._driver.stream_create()
    assert code == 0
    with simulated.clock_limit(0) as clock:
        ticket = setup.load(order=[(i * CHUNK, CHUNK) for i in range(8)])
        for layer in range(8):
            clock.move(layer * 0.001)
            ticket.wait_on_stream(stream, layer=layer, timeout_s=SOON)
            simulated.compute(stream, 0.001)
    simulated._driver.stream_synchronize(stream)
    assert simulated.now_s == pytest.approx(0.009), "8 ms of copies, then the last layer's kernels"
    setup.close()


def test_a_gate_opens_soon_after_the_stream_is_done(simulated: SimulatedDevice) -> None:
    setup = Setup(FaultyDevice(simulated))
    code, stream = simulated._driver.stream_create()
    assert code == 0
    simulated.compute(stream, 0.010)
    with simulated.clock_limit(0):
        gated = setup.load(after=stream, order=[(0, CHUNK)], priority=-1)
        other = setup.load(order=[(CHUNK, 3 * CHUNK)])
    gated.wait(SOON)
    other.wait(SOON)
    copies = simulated.copies
    assert [copy.begin_s for copy in copies[:3]] == pytest.approx([0, 0.001, 0.002], abs=1e-5)
    assert 0.010 <= copies[3].begin_s < 0.0106
    setup.close()


def test_an_event_is_not_destroyed_while_it_is_handed_to_a_stream(
    simulated: SimulatedDevice,
) -> None:
    setup = Setup(FaultyDevice(simulated))
    code, stream = simulated._driver.stream_create()
    assert code == 0
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            ticket.wait_on_stream(stream, num_bytes=CHUNK, timeout_s=SOON)
        except ak.Error as error:
            errors.append(error)

    with setup.device.holding("stream_wait_event"):
        with simulated.clock_limit(0):
            ticket = setup.load()
            waiter = threading.Thread(target=wait)
            waiter.start()
            until(lambda: setup.device.calls.get("stream_wait_event"))
        ticket.wait(SOON)
        closer = threading.Thread(target=setup.prefetcher.close)
        closer.start()
        time.sleep(0.05)
        assert "event_destroy" not in setup.device.calls
    waiter.join(SOON)
    closer.join(SOON)
    assert errors == []
    assert setup.device.calls["event_destroy"] == 4
    setup.close()
