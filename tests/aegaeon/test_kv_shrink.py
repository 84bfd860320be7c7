"""KV caches that give back what no live block needs while another model runs."""

import inspect
import random
import sys
import textwrap
from contextlib import suppress

import numpy as np
import pytest
from switcher_support import (
    MIB,
    PatternModel,
    activate_as_the_loop_does,
    assert_ledger_holds,
)

import aegaeon_kernels as ak
from aegaeon.core.clock import ManualClock
from aegaeon.switching.kv_store import HostKVStore
from aegaeon.switching.residency import KVUnit
from aegaeon.switching.switcher import Switcher, SwitchFailed
from aegaeon_kernels.kv_compact import Moves
from aegaeon_kernels.kv_layout import KVLayout, Plane
from aegaeon_kernels.testing import FaultyDevice

NUM_BLOCKS = 64
BLOCK = 256 << 10
KV = NUM_BLOCKS * BLOCK  # 16 MiB: eight handles of eight blocks
WEIGHTS = 4 * MIB
LAYOUTS = {
    "blocks outermost": KVLayout((Plane(0, BLOCK),), BLOCK, NUM_BLOCKS, KV),
    "layers outermost": KVLayout(
        (Plane(0, BLOCK // 2), Plane(KV // 2, BLOCK // 2)), BLOCK // 2, NUM_BLOCKS, KV
    ),
}


class LargeCache(PatternModel):
    """As a PatternModel, with more KV than a handle, and block 0 as vLLM's null block."""

    layout = LAYOUTS["blocks outermost"]

    def __post_init__(self) -> None:
        self.switcher.add_model(self.name)
        image = ak.HostImage.allocate(WEIGHTS, device=self.switcher.arena.device)
        image.tensor().fill_(self.number)
        image.seal()
        self.weights = self.switcher.add_weights(self.name, image)
        self.kv: KVUnit = self.switcher.add_kv(self.name, KV)
        self.kv.layouts = (self.layout,)
        self.kv.book = self

    def immovable(self) -> list[int]:
        return [0]

    def pages(self, block: int) -> np.ndarray:
        memory = self.kv.region.numpy((KV,), "u1")
        page = self.layout.block_bytes
        return np.stack([memory[o + block * s :][:page] for o, s in self.layout.planes])

    def write(self, block: int, value: int) -> None:
        memory = self.kv.region.numpy((KV,), "u1")
        for offset, stride in self.layout.planes:
            memory[offset + block * stride :][: self.layout.block_bytes] = value
        self.contents[block] = value
        self.kv.written([block])


class LayersOutermost(LargeCache):
    layout = LAYOUTS["layers outermost"]


def make(
    capacity: int, names: str = "ab", kind: type[LargeCache] = LargeCache, *, faulty: bool = False
) -> tuple[Switcher, list[LargeCache]]:
    device: ak.Device = ak.Device("host", memory_bytes=capacity)
    if faulty:
        device = FaultyDevice(device)
    switcher = Switcher(
        arena=ak.Arena(device, capacity_bytes=capacity),
        prefetcher=ak.Prefetcher(device),
        kv_store=HostKVStore(ak.HostImage.allocate(48 * MIB, device=device)),
        clock=ManualClock(),
    )
    return switcher, [kind(name, i + 1, switcher) for i, name in enumerate(names)]


def assert_live_blocks_are_kept(models: list[LargeCache]) -> None:
    """Every live block is on the device, or in the store."""
    for model in models:
        if not model.kv.holds_bytes:
            assert model.kv.copies.keys() >= model.contents.keys()
            continue
        mapped = model.kv.region.mapped_ranges()
        for block in model.contents:
            for offset, stride in model.layout.planes:
                begin = offset + block * stride
                assert any(
                    start <= begin and begin + model.layout.block_bytes <= start + size
                    for start, size in mapped
                ), (model.name, block)


def assert_books_are_right(switcher: Switcher, models: list[LargeCache]) -> None:
    """As above, and neither holds anything else."""
    assert_ledger_holds(switcher)
    assert_live_blocks_are_kept(models)
    for model in models:
        assert model.kv.holds_bytes or not model.kv.mapped_bytes
    stored = sum(model.kv.num_copies for model in models)
    assert switcher.kv_store.stats().used_bytes == stored * BLOCK


ROOM = WEIGHTS + KV + 4 * MIB  # beside one model: two handles, of 16 blocks


def make_caches(
    names: str = "ab", kind: type[LargeCache] = LargeCache, *, capacity: int = KV + 4 * MIB
) -> tuple[Switcher, list[LargeCache]]:
    """Without weights, which may be cheaper to bring back than a few blocks are, or dearer."""
    switcher, models = make(capacity, names, kind)
    for model in models:
        switcher.models[model.name].units.remove(model.weights)
        model.weights.close()
    return switcher, models


def assert_blocks_are_intact(model: LargeCache) -> None:
    for block, value in model.contents.items():
        assert (model.pages(block) == value).all(), (model.name, block)


def test_blocks_stay_on_the_device_when_their_handles_suffice():
    switcher, (a, b) = make(ROOM)
    switcher.activate("a")
    blocks = (1, 10, 20, 30, 40, 63)  # enough for weights to be the cheaper ones to bring back
    for block in blocks:
        a.write(block, block)
    switcher.activate("b")
    record = switcher.records[-1]
    assert (record.shrunk, record.compacted_blocks, record.bytes_out) == (("a",), 5, 0)
    assert sorted(a.contents) == [1, 2, 3, 4, 5, 6]
    assert a.kv.mapped_bytes == 2 * MIB
    assert b.kv.resident
    for block in blocks:
        b.write(block, block + 100)
    switcher.activate("a")
    assert switcher.records[-1].bytes_in == WEIGHTS  # and no KV
    assert a.kv.mapped_bytes == KV
    a.assert_intact()
    switcher.activate("b")
    b.assert_intact()
    assert switcher.kv_store.stats().used_bytes == 0
    switcher.close()


def test_planes_one_behind_the_other_give_back_their_ends():
    switcher, (a, _) = make_caches(kind=LayersOutermost)
    switcher.activate("a")
    for block in (3, 62):
        a.write(block, block)
    switcher.activate("b")
    assert a.kv.region.mapped_ranges() == [(0, 2 * MIB), (KV // 2, 2 * MIB)]
    switcher.activate("a")
    assert_blocks_are_intact(a)


def test_what_is_live_beyond_the_room_goes_to_the_host():
    switcher, (a, b) = make_caches()
    switcher.activate("a")
    for block in range(1, 40):
        a.write(block, block)
    switcher.activate("b")
    assert switcher.records[-1].bytes_out == 39 * BLOCK
    assert a.kv.mapped_bytes == 0
    switcher.activate("a")
    assert_blocks_are_intact(a)
    assert b.kv.mapped_bytes == 0


def test_only_as_many_caches_shrink_as_need_to():
    switcher, (a, b, _) = make_caches("abc", capacity=2 * KV + 2 * MIB)
    for model, num_blocks in ((a, 4), (b, 20)):
        switcher.activate(model.name)
        for block in range(1, num_blocks):
            model.write(block, model.number)
    switcher.activate("c")
    assert switcher.records[-1].shrunk == ("a",)
    assert b.kv.resident


def test_the_memory_that_is_given_back_is_somebody_elses():
    """Poisoned: who reads it, or forgets to move a block out of it, sees it."""
    switcher, (a, b) = make_caches()
    switcher.activate("a")
    a.write(50, 50)
    switcher.activate("b")
    b.kv.region.numpy((KV,), "u1")[:] = 0xFF
    switcher.activate("a")
    assert_blocks_are_intact(a)


def test_a_block_keeps_its_copy_when_it_moves():
    switcher, (a, b) = make_caches()
    switcher.activate("a")
    for block in range(1, 40):
        a.write(block, block)
    switcher.activate("b")  # all to the host
    switcher.activate("a")
    for block in range(1, 31):
        del a.contents[block]
    a.write(35, 77)  # its copy is out of date
    switcher.activate("b")  # 9 stay, at new places
    assert switcher.records[-1].compacted_blocks == 9
    b.write(1, 1)
    switcher.activate("a")
    assert_blocks_are_intact(a)
    for block in range(50, 64):
        a.write(block, block)
    switcher.activate("b")  # 23 do not fit
    # What was saved before it moved need not be copied again.
    assert switcher.records[-1].bytes_out == (1 + 14) * BLOCK
    switcher.activate("a")
    assert_blocks_are_intact(a)


def test_a_block_moves_to_where_a_dead_one_was_whose_copy_is_still_on_the_host():
    switcher, (a, b) = make_caches()
    switcher.activate("a")
    for block in range(1, 40):
        a.write(block, block)
    switcher.activate("b")
    switcher.activate("a")
    del a.contents[7]
    a.kv.move(Moves(np.array([30]), np.array([7])))
    assert_books_are_right(switcher, [a, b])
    switcher.activate("b")
    switcher.activate("a")
    assert_blocks_are_intact(a)
    assert_books_are_right(switcher, [a, b])


def test_a_request_may_end_while_its_cache_is_shrunk():
    switcher, (a, b) = make_caches()
    switcher.activate("a")
    for block in (10, 20, 30):
        a.write(block, block)
    switcher.activate("b")
    del a.contents[next(block for block, value in a.contents.items() if value == 20)]
    b.write(1, 1)
    switcher.evict("a")
    assert switcher.kv_store.stats().used_bytes == 2 * BLOCK
    switcher.activate("a")
    assert_blocks_are_intact(a)
    assert_books_are_right(switcher, [a, b])


def test_a_cache_whose_blocks_cannot_be_moved_is_evicted_instead(monkeypatch, caplog):
    """Whoever comes in is not to blame."""
    switcher, (a, b) = make_caches()
    switcher.activate("a")
    a.write(50, 50)

    def fail(*args: object) -> None:
        raise RuntimeError("a kernel does not compile")

    with monkeypatch.context() as patched:
        patched.setattr(ak.kv, "move", fail)
        switcher.activate("b")
    record = switcher.records[-1]
    assert (record.shrunk, record.evicted, record.compacted_blocks) == ((), ("a",), 0)
    assert "a kernel does not compile" in caplog.text
    assert a.contents == {50: 50}
    b.write(50, 51)
    switcher.activate("a")
    assert_blocks_are_intact(a)
    switcher.activate("b")  # that was then
    assert switcher.records[-1].shrunk == ("a",)
    assert_books_are_right(switcher, [a, b])
    assert_blocks_are_intact(b)


def random_row(seed: int, kind: type[LargeCache], num_steps: int) -> Switcher:
    """Models that write, abort and move blocks at any time, with every byte and book compared."""
    rng = random.Random(seed)
    switcher, models = make(WEIGHTS + KV + (seed + 1) * 4 * MIB, "abc", kind)
    for _ in range(num_steps):
        model = rng.choice(models)
        switcher.activate(model.name)
        model.assert_intact()
        for _ in range(rng.randrange(12)):
            model.write(rng.randrange(1, NUM_BLOCKS), rng.randrange(256))
        for other in models:
            for _ in range(rng.randrange(5)):  # aborted, wherever they are
                if other.contents:
                    del other.contents[rng.choice(list(other.contents))]
        if model.contents and rng.random() < 0.5:  # compaction, or the opposite of it, at any time
            free = [b for b in range(1, NUM_BLOCKS) if b not in model.contents]
            count = min(len(free), len(model.contents))
            model.kv.move(
                Moves(
                    np.array(rng.sample(list(model.contents), count), dtype=np.int64),
                    np.array(rng.sample(free, count), dtype=np.int64),
                )
            )
            model.assert_intact()
        assert_books_are_right(switcher, models)
    return switcher


@pytest.mark.parametrize("kind", [LargeCache, LayersOutermost])
@pytest.mark.parametrize("seed", range(4))
def test_any_row_of_switches_keeps_all_blocks(seed, kind):
    switcher = random_row(seed, kind, 40)
    assert any(record.shrunk for record in switcher.records)
    switcher.close()


MUTANTS = [
    (
        KVUnit,
        "move",
        "ak.kv.move(self.region, moves.src_ids, moves.dst_ids, self._layouts)",
        "pass",
    ),
    (KVUnit, "move", "self.book.renumber(moves)", "pass"),
    (KVUnit, "move", "{renamed.get(block, block): slot", "{block: slot"),
    (KVUnit, "move", "renamed.get(block, block) for", "block for"),
    (KVUnit, "move", "self._forget_dead(self.book.live())", "pass"),
    (KVUnit, "_unsaved", "or block in self._written", ""),
    (KVUnit, "start_load", "if self.holds_bytes:", "if True:"),
    (KVUnit, "finish_save", "self._copies |= self._saving", "pass"),
    (KVUnit, "finish_load", "self._store.release(self._loading)", "pass"),
    (KVUnit, "_forget_dead", "self._store.release(", "list("),
    (Switcher, "_transfer", "        ticket.wait()\n    except", "        pass\n    except"),
]


def all_checks() -> None:
    test_a_block_keeps_its_copy_when_it_moves()
    test_a_block_moves_to_where_a_dead_one_was_whose_copy_is_still_on_the_host()
    for seed in range(2):
        random_row(seed, LargeCache, 25)


@pytest.mark.parametrize(("owner", "name", "old", "new"), MUTANTS)
def test_a_mutant_is_noticed(owner, name, old, new, monkeypatch):
    """One thing left out: a wait, a rename, a reference."""
    source = textwrap.dedent(inspect.getsource(vars(owner)[name]))
    assert source.count(old) == 1, source
    source = source.replace(old, new).replace("super()", f"super({owner.__name__}, self)")
    names = dict(vars(sys.modules[owner.__module__]))
    exec(compile("from __future__ import annotations\n" + source, name, "exec"), names)
    monkeypatch.setattr(owner, name, names[name])
    with pytest.raises((AssertionError, KeyError, ak.Error, SwitchFailed)):
        all_checks()


def fill_and_shrink(switcher: Switcher, a: LargeCache, b: LargeCache) -> None:
    """`b` runs; of `a` two handles of each plane are left, and requests in the first have ended."""
    switcher.activate("b")
    b.write(9, 99)
    switcher.activate("a")
    per_handle = 2 * MIB // a.layout.block_bytes
    for block in range(1, 2 * per_handle):
        a.write(block, block)
    switcher.activate("b")
    assert switcher.records[-1].shrunk == ("a",)
    assert a.kv.mapped_bytes == 4 * MIB * len(a.layout.planes)
    for block in range(1, per_handle + 1):
        del a.contents[block]


def fill(switcher: Switcher, a: LargeCache, b: LargeCache) -> None:
    switcher.activate("b")
    b.write(9, 99)
    switcher.activate("a")
    for block in (5, 40, 63):
        a.write(block, block)


# What is there, what is done, and who is resident if one call of that fails.
FAULTS = {
    "shrinking": (fill, lambda switcher: switcher.activate("b"), "a"),
    "coming back after an abort": (
        fill_and_shrink,
        lambda switcher: switcher.activate("a"),
        "b",
    ),
    "evicting": (fill, lambda switcher: switcher.evict("a"), "a"),
    "evicting what is shrunk": (fill_and_shrink, lambda switcher: switcher.evict("a"), "b"),
}


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("kind", [LargeCache, LayersOutermost])
@pytest.mark.parametrize("persistent", [False, True])
def test_when_any_one_driver_call_fails_no_block_is_lost(what, kind, persistent):
    prepare, act, resident = FAULTS[what]
    room = WEIGHTS + KV + 4 * MIB * len(kind.layout.planes)  # beside one model: two handles each
    n, failed = 0, True
    while failed:
        n += 1
        switcher, (a, b) = make(room, kind=kind, faulty=True)
        device = switcher.arena.device
        assert isinstance(device, FaultyDevice)
        prepare(switcher, a, b)
        device.reset()
        device.fail_call(n, persistent=persistent)
        with suppress(SwitchFailed):
            act(switcher)
        failed = device.num_calls >= n
        assert_ledger_holds(switcher)
        assert_live_blocks_are_kept([a, b])
        if failed and not persistent:
            assert switcher.is_resident(resident)
            {"a": a, "b": b}[resident].assert_intact()
        device.reset()
        for model in (a, b, a):
            activate_as_the_loop_does(switcher, model.name, tries=5 if persistent else 1)
            model.assert_intact()
            assert_live_blocks_are_kept([a, b])
        switcher.evict("a")
        switcher.evict("b")
        assert_books_are_right(switcher, [a, b])
        switcher.close()
    assert n > 3
