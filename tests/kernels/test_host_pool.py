"""HostPool: what it is made of, that nothing is pinned after its start, and where its bytes go."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kernel_support import MIB, StubCuda, pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

UNIT = 64 << 10  # images start at multiples of it
PIECE = 2 * MIB
WORKING = {
    memory.kind
    for memory in ak.HostMemory.probe(ak.Device("host", memory_bytes=MIB))
    if memory.worked
}
LOCKED_BY_US = sorted(WORKING & {"hugetlb", "thp", "shm"})


def kinds_of(attempts: tuple[ak.HostMemory, ...]) -> dict[str, str]:
    return {attempt.kind: attempt.remark for attempt in attempts if not attempt.worked}


# ---- the ladder --------------------------------------------------------------------------------


def test_the_probe_says_of_every_kind_whether_it_works_and_why_not(host: FaultyDevice) -> None:
    probed = ak.HostMemory.probe(host)
    assert [memory.kind for memory in probed] == [
        "numa",
        "hugetlb",
        "thp",
        "shm",
        "driver",
        "pageable",
    ]
    found = {memory.kind: memory for memory in probed}
    assert "not supported" in found["numa"].remark
    assert found["hugetlb"].worked or "vm.nr_hugepages" in found["hugetlb"].remark
    assert found["thp"].worked or "forbids" in found["thp"].remark
    assert found["shm"].worked
    assert found["driver"].worked
    assert found["pageable"].worked
    assert all(memory.remark for memory in probed)
    assert host.live == {}


def test_a_cuda_device_gives_memory_on_its_node_first(stub_cuda: StubCuda) -> None:
    device = FaultyDevice(ak.Device("cuda:0", library=stub_cuda.path))
    pool = ak.HostPool(device, 4 * MIB)
    assert (pool.kind, pool.pinned, len(pool.attempts)) == ("numa", True, 1)
    del pool
    assert device.live == {}


def test_without_numa_memory_the_next_kind_is_taken_and_the_reason_kept(
    stub_cuda: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_CUDA_NUMA", "0")
    device = ak.Device("cuda:0", library=stub_cuda.path)
    pool = ak.HostPool(device, 4 * MIB)
    assert pool.kind in ("hugetlb", "thp", "shm")
    assert pool.pinned
    assert "host_alloc_numa" in kinds_of(pool.attempts)["numa"]


@pytest.mark.parametrize("kind", [*LOCKED_BY_US, "driver", "pageable"])
def test_every_kind_makes_a_pool(device: FaultyDevice, kind: str) -> None:
    with ak.HostPool(device, 5 * MIB + 1, kinds=[kind], numa_node=0) as pool:
        assert pool.kind == kind
        assert pool.pinned == (device.kind == "cuda" and kind != "pageable")
        image = ak.HostImage.allocate(5 * MIB, pool=pool)
        assert image.pinned == pool.pinned
        array = np.frombuffer(image, np.uint8)
        assert not array.any()
        array[:] = pattern(5 * MIB, seed=1)
        image.seal()
        image.verify()
        del image, array
    assert device.live == {}


@pytest.mark.parametrize("kind", LOCKED_BY_US)
def test_pages_are_locked_in_pieces(device: FaultyDevice, kind: str) -> None:
    pool = ak.HostPool(device, 7 * MIB, kinds=[kind], piece_bytes=PIECE)
    assert device.calls["host_register"] == 4
    assert device.live == {"registrations": 4}
    first = ak.HostImage.allocate(3 * MIB, pool=pool)
    second = ak.HostImage.allocate(4 * MIB, pool=pool)
    assert [first.copyable_bytes(offset) for offset in (0, 1, PIECE, 3 * MIB - 1, 3 * MIB)] == [
        PIECE,
        PIECE - 1,
        MIB,
        1,
        0,
    ]
    assert [second.copyable_bytes(offset) for offset in (0, MIB, 3 * MIB + 5)] == [
        MIB,
        PIECE,
        MIB - 5,
    ]
    del first, second
    pool.close()
    assert device.live == {}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_one_piece_that_cannot_be_locked_gives_back_the_others(
    device: FaultyDevice, n: int
) -> None:
    device.fail_call(n, call="host_register", code=719)
    pool = ak.HostPool(device, 4 * PIECE, kinds=["shm", "driver"], piece_bytes=PIECE)
    assert pool.kind == "driver"
    assert "code 719" in kinds_of(pool.attempts)["shm"]
    assert device.calls.get("host_unregister", 0) == n - 1
    assert device.live == {"host_allocations": 1}


def test_unlocked_memory_is_the_last_resort(device: FaultyDevice) -> None:
    device.fail_call(1, code=719, persistent=True)
    pool = ak.HostPool(device, 4 * MIB)
    assert (pool.kind, pool.pinned) == ("pageable", False)
    assert len(pool.attempts) == 6
    image = ak.HostImage.allocate(4 * MIB, pool=pool)
    assert not image.pinned
    del image
    device.reset()
    del pool
    assert device.live == {}


def test_no_kind_that_works_is_an_error_with_all_reasons(host: FaultyDevice) -> None:
    host.fail_call(1, call="host_register", code=719)
    with pytest.raises(ak.DriverError, match=r"host_alloc_numa.*host_register") as caught:
        ak.HostPool(host, 4 * MIB, kinds=["numa", "shm"])
    assert not isinstance(caught.value, ak.OutOfMemory)
    with pytest.raises(ak.OutOfMemory) as out_of_memory:
        ak.HostPool(host, 1 << 50)
    assert out_of_memory.value.bytes == 1 << 50
    assert host.live == {}


def test_a_pool_is_not_what_gets_the_process_killed(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"

    def available() -> int:
        return _C.available_host_bytes(proc=str(proc), cgroups=str(cgroups))

    (proc / "self").mkdir(parents=True)
    inner = cgroups / "a" / "b"
    inner.mkdir(parents=True)
    assert available() == (1 << 64) - 1  # nothing is known
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   1000 kB\n")
    assert available() == 1000 << 10
    (proc / "self" / "cgroup").write_text("1:memory:/old\n0::/a/b\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("4096\n")
    assert available() == 1000 << 10
    (cgroups / "a" / "memory.max").write_text("500000\n")
    (cgroups / "a" / "memory.current").write_text("400000\n")
    assert available() == 100000
    (cgroups / "a" / "memory.stat").write_text("anon 7\ninactive_file 1000\nactive_file 200\n")
    assert available() == 101200
    (inner / "memory.max").write_text("4000\n")  # less than is used
    assert available() == 0
    (proc / "self" / "cgroup").write_text("0::/\n")  # in a container: its own group is the root
    assert available() == 1000 << 10
    (cgroups / "memory.max").write_text("70000\n")
    (cgroups / "memory.current").write_text("0\n")
    assert available() == 70000


def test_a_pools_arguments_are_checked(host: FaultyDevice) -> None:
    for arguments, message in (
        ({"capacity_bytes": 0}, "capacity_bytes=0"),
        ({"capacity_bytes": MIB, "kinds": ["huge"]}, "'huge': expected some of numa, hugetlb"),
        ({"capacity_bytes": MIB, "kinds": []}, "kinds is empty"),
        ({"capacity_bytes": MIB, "num_threads": 0}, "num_threads=0"),
        ({"capacity_bytes": MIB, "piece_bytes": 4096}, "piece_bytes=4096"),
    ):
        with pytest.raises(ValueError, match=message):
            ak.HostPool(host, **arguments)  # type: ignore[arg-type]
    pool = ak.HostPool(host, MIB)
    with pytest.raises(ValueError, match="pool is for"):
        ak.HostImage.allocate(1, pool=pool, device=ak.Device("host", memory_bytes=MIB))
    assert ak.HostImage.allocate(1, pool=pool, device=host).size_bytes == 1


def test_other_threads_run_while_pages_are_locked(host: FaultyDevice) -> None:
    pools: list[ak.HostPool] = []
    with host.holding("host_register"):
        thread = threading.Thread(
            target=lambda: pools.append(ak.HostPool(host, MIB, kinds=["shm"]))
        )
        thread.start()
        while "host_register" not in host.calls:  # holding the GIL it would never let us look
            pass
        assert pools == []
    thread.join()
    assert pools[0].kind == "shm"


@pytest.mark.parametrize("chunk_bytes", [8 * MIB, PIECE, PIECE // 2 + 1])
def test_no_copy_touches_two_pieces(device: FaultyDevice, chunk_bytes: int) -> None:
    """Drivers refuse such a copy (https://github.com/LMCache/LMCache/issues/2413), as the stub."""
    pool = ak.HostPool(device, 10 * MIB, kinds=["shm"], piece_bytes=PIECE)
    in_front = ak.HostImage.allocate(MIB, pool=pool)
    image, back = (ak.HostImage.allocate(4 * MIB + 5, pool=pool) for _ in range(2))
    np.frombuffer(image, np.uint8)[:] = pattern(4 * MIB + 5, seed=1)
    arena = ak.Arena(device, capacity_bytes=6 * MIB)
    region = arena.reserve(6 * MIB, owner="a")
    region.map()
    with ak.Prefetcher(device, chunk_bytes=chunk_bytes) as prefetcher:
        device.reset()
        prefetcher.load(image, region).wait(20)
        prefetcher.store(region, back, order=[(0, MIB), (MIB, 3 * MIB + 5)]).wait(20)
    assert_bitwise_equal(memoryview(back), memoryview(image))
    if chunk_bytes == 8 * MIB:
        loaded, stored = [MIB, PIECE, MIB + 5], [MIB - UNIT, PIECE, MIB + UNIT + 5]
        assert [size for _, _, size in device.copies] == loaded + stored
    del in_front


# ---- images in it ------------------------------------------------------------------------------


def test_images_come_and_go_without_a_driver_call(device: FaultyDevice) -> None:
    pool = ak.HostPool(device, 8 * MIB, piece_bytes=PIECE)
    device.reset()
    for i in range(20):
        images = [ak.HostImage.allocate((1 + i % 2) * MIB, pool=pool) for _ in range(4)]
        images[0].seal()
        del images
    assert device.calls == {}
    assert pool.stats().free_bytes == 8 * MIB


def test_a_full_pool_says_who_holds_the_space(host: FaultyDevice) -> None:
    pool = ak.HostPool(host, 10 * MIB)
    keep = [ak.HostImage.allocate(MIB, pool=pool, name=name) for name in "abcdefghij"]
    sealed = ak.HostPool(host, 10 * MIB)
    del keep[0], keep[4]  # 'a' and 'f': free, but apart
    with pytest.raises(ak.OutOfMemory) as caught:
        ak.HostImage.allocate(2 * MIB, pool=pool, name="new")
    message = str(caught.value)
    assert message == (
        "'new' asked a host pool for 2 MiB: 2 MiB of 10 MiB are free, at most 1 MiB in one piece; "
        "held by 'j' 1 MiB, 'i' 1 MiB, 'h' 1 MiB, 'g' 1 MiB, 'e' 1 MiB, 'd' 1 MiB, 'c' 1 MiB, "
        "'b' 1 MiB"
    )
    assert (caught.value.bytes, isinstance(caught.value, MemoryError)) == (2 * MIB, True)
    assert pool.stats().num_free_parts == 2
    keep.clear()
    assert ak.HostImage.allocate(10 * MIB, pool=pool).size_bytes == 10 * MIB
    assert sealed.stats().holders == {}


def test_memory_that_was_used_before_is_cleared(host: FaultyDevice) -> None:
    pool = ak.HostPool(host, 4 * MIB)
    image = ak.HostImage.allocate(3 * MIB - 5, pool=pool)
    np.frombuffer(image, np.uint8)[:] = 255
    del image
    gc.collect()
    whole = np.frombuffer(ak.HostImage.allocate(4 * MIB, pool=pool), np.uint8)
    assert not whole.any()


def test_a_view_keeps_its_part_of_the_pool(host: FaultyDevice) -> None:
    pool = ak.HostPool(host, MIB)
    array = np.frombuffer(ak.HostImage.allocate(MIB, pool=pool, name="viewed"), np.uint8)
    with pytest.raises(ak.LifecycleError, match="'viewed' 1 MiB"):
        pool.close()
    array[:] = 7
    del pool
    gc.collect()
    assert array.sum() == 7 * MIB
    del array
    assert host.live == {}


def test_an_error_on_its_way_is_not_hidden_behind_an_image_that_is_left(host: FaultyDevice) -> None:
    pool = ak.HostPool(host, MIB)
    array = np.frombuffer(ak.HostImage.allocate(MIB, pool=pool, name="left"), np.uint8)
    with pytest.raises(ZeroDivisionError) as caught, pool:
        raise ZeroDivisionError
    assert any("'left' 1 MiB" in note for note in caught.value.__notes__)
    assert array.size == MIB
    del array
    pool.close()
    assert host.live == {}


def test_a_closed_pool_gives_nothing(host: FaultyDevice) -> None:
    pool = ak.HostPool(host, MIB)
    pool.close()
    pool.close()
    assert host.live == {}
    with pytest.raises(ak.LifecycleError, match="closed"):
        ak.HostImage.allocate(1, pool=pool)


def test_threads_share_a_pool(host: FaultyDevice) -> None:
    pool = ak.HostPool(host, 64 * MIB)
    failed: list[str] = []

    def work(value: int) -> None:
        rng = np.random.default_rng(value)
        for _ in range(60):
            size = int(rng.integers(1, 4 * MIB))
            array = np.frombuffer(ak.HostImage.allocate(size, pool=pool), np.uint8)
            if array.any():
                failed.append("not zero")
            array[:] = value
            if (array != value).any():
                failed.append("somebody else wrote here")

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert pool.stats().free_bytes == 64 * MIB


class PoolMachine(RuleBasedStateMachine):
    """A pool against an oracle that marks units of 64 KiB one by one."""

    NUM_UNITS = 24

    def __init__(self) -> None:
        super().__init__()
        device = ak.Device("host", memory_bytes=64 * MIB)
        self.pool = ak.HostPool(device, self.NUM_UNITS * UNIT)
        first = ak.HostImage.allocate(1, pool=self.pool)
        self.base = first.address
        del first
        self.units = [0] * self.NUM_UNITS  # 0: free, else the number of the image
        self.images: dict[int, tuple[ak.HostImage, int]] = {}  # with its first byte's value
        self.next_id = 1

    def free_runs(self) -> list[tuple[int, int]]:
        """(length, start), best fit first."""
        runs, start = [], None
        for i, owner in enumerate([*self.units, -1]):
            if owner == 0 and start is None:
                start = i
            elif owner != 0 and start is not None:
                runs.append((i - start, start))
                start = None
        return sorted(runs)

    @rule(size=st.integers(1, 8 * UNIT))
    def allocate(self, size: int) -> None:
        needed = -(-size // UNIT)
        fitting = [run for run in self.free_runs() if run[0] >= needed]
        if not fitting:
            with pytest.raises(ak.OutOfMemory):
                ak.HostImage.allocate(size, pool=self.pool)
            return
        number = self.next_id
        self.next_id += 1
        image = ak.HostImage.allocate(size, pool=self.pool, name=str(number))
        start = fitting[0][1]
        assert image.address == self.base + start * UNIT, "not the best fit"
        array = np.frombuffer(image, np.uint8)
        assert not array.any()
        array[:] = number % 255 + 1
        self.units[start : start + needed] = [number] * needed
        self.images[number] = (image, number % 255 + 1)

    @precondition(lambda self: self.images)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.images)))
        image, value = self.images.pop(number)
        assert (np.frombuffer(image, np.uint8) == value).all()
        del image
        self.units = [0 if owner == number else owner for owner in self.units]

    @invariant()
    def the_ledger_is_the_oracles(self) -> None:
        stats = self.pool.stats()
        runs = self.free_runs()
        assert stats.free_bytes == self.units.count(0) * UNIT
        assert stats.num_free_parts == len(runs)
        assert stats.largest_free_bytes == (runs[-1][0] * UNIT if runs else 0)
        held = {str(number): self.units.count(number) * UNIT for number in self.images}
        assert stats.holders == held
        assert sum(held.values()) + stats.free_bytes == stats.capacity_bytes

    def teardown(self) -> None:
        self.images.clear()
        self.pool.close()


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
TestPoolMachine = PoolMachine.TestCase
