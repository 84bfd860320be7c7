"""Models that are patterns, on a real switcher over the host driver.

Weights never change, KV blocks are rewritten while their model is resident, and an oracle remembers
what each live block must hold.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, field

import torch

import aegaeon_kernels as ak
from aegaeon.core.clock import MonotonicClock
from aegaeon.switching.kv_store import HostKVStore
from aegaeon.switching.residency import DroppedKV, KVUnit
from aegaeon.switching.switcher import Switcher, SwitchFailed
from aegaeon_kernels.kv_compact import Moves
from aegaeon_kernels.kv_layout import KVLayout, Plane
from aegaeon_kernels.testing import FaultyDevice

MIB = 1 << 20
WEIGHTS = 4 * MIB
KV = 2 * MIB
NUM_BLOCKS = 64
PAGE = KV // NUM_BLOCKS // 2
BLOCK = 2 * PAGE
INVALID_VALUE, OUT_OF_MEMORY, LAUNCH_FAILED = 1, 2, 719


@dataclass
class PatternModel:
    """Two planes of pages, as a two-layer model has them. It keeps its own book of live blocks."""

    name: str
    number: int
    switcher: Switcher
    contents: dict[int, int] = field(default_factory=dict)  # live block id -> its bytes

    def __post_init__(self) -> None:
        device = self.switcher.arena.device
        self.switcher.add_model(self.name)
        image = ak.HostImage.allocate(WEIGHTS, device=device)
        image.tensor().fill_(self.number)
        image.seal()
        self.weights = self.switcher.add_weights(self.name, image)
        self.kv: KVUnit = self.switcher.add_kv(self.name, KV)
        self.kv.layouts = (KVLayout((Plane(0, PAGE), Plane(KV // 2, PAGE)), PAGE, NUM_BLOCKS, KV),)
        self.kv.book = self

    def live(self) -> list[int]:
        return list(self.contents)

    def drop(self) -> DroppedKV:
        dropped = DroppedKV(num_blocks=len(self.contents), num_requests=1)
        self.contents.clear()
        return dropped

    def immovable(self) -> list[int]:
        return []

    def renumber(self, moves: Moves) -> None:
        for old, new in zip(moves.src_ids.tolist(), moves.dst_ids.tolist(), strict=True):
            assert new not in self.contents
            self.contents[new] = self.contents.pop(old)

    def pages(self, block: int) -> torch.Tensor:
        return self.kv.region.tensor((2, NUM_BLOCKS, PAGE), torch.uint8)[:, block]

    def write(self, block: int, value: int) -> None:
        self.pages(block).fill_(value)
        self.contents[block] = value
        self.kv.written([block])

    def assert_intact(self) -> None:
        weights = self.weights.region.tensor((WEIGHTS,), torch.uint8)
        assert int(weights.min()) == int(weights.max()) == self.number
        for block, value in self.contents.items():
            page = self.pages(block)
            assert int(page.min()) == int(page.max()) == value, (self.name, block)


def make_switcher(
    *, capacity: int, faulty: bool = False, names: str = "abc", host_kv: int = 8 * MIB
) -> tuple[Switcher, list[PatternModel]]:
    device: ak.Device = ak.Device("host", memory_bytes=capacity)
    if faulty:
        device = FaultyDevice(device)
    switcher = Switcher(
        arena=ak.Arena(device, capacity_bytes=capacity),
        prefetcher=ak.Prefetcher(device),
        kv_store=HostKVStore(ak.HostImage.allocate(host_kv, device=device)),
        clock=MonotonicClock(),
    )
    return switcher, [PatternModel(name, i + 1, switcher) for i, name in enumerate(names)]


def assert_ledger_holds(switcher: Switcher) -> None:
    stats = switcher.arena.stats()
    assert stats.owned_bytes + stats.free_bytes + stats.quarantined_bytes == stats.capacity_bytes
    mapped = sum(unit.mapped_bytes for m in switcher.models.values() for unit in m.units)
    assert stats.owned_bytes == mapped


def assert_every_live_block_is_somewhere(models: list[PatternModel]) -> None:
    """Mapped or stored; and the store holds nothing else."""
    for model in models:
        if not model.kv.resident:
            assert model.kv.copies.keys() >= model.contents.keys()
    used = sum(model.kv.num_copies for model in models) * BLOCK
    assert models[0].switcher.kv_store.stats().used_bytes == used


def activate_as_the_loop_does(switcher: Switcher, name: str, *, tries: int) -> None:
    """Try again after a failure: after a driver that would not even say whether its copies are
    over, their memory stays in use until it says so.
    """
    for _ in range(tries - 1):
        with suppress(SwitchFailed):
            return switcher.activate(name)
        time.sleep(0.01)
    return switcher.activate(name)
