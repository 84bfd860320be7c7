"""Blocks between a region and a host image, by whichever of three ways is the fastest for them.

    pieces   a copy for every run of bytes that goes on on both sides
    packed   by the kernel to one buffer on the device, and from there in one copy; back alike
    kernel   straight between the two by the kernel: where it sees both, which is on the host device

Which one is fastest depends on the machine and on the length of the runs, so it is measured:
`calibrate` times each way and fits its cost. Knows regions, images and layouts; which blocks move,
and when, is its user's business.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aegaeon_kernels import kv
from aegaeon_kernels.arena import Region
from aegaeon_kernels.errors import Error
from aegaeon_kernels.host_image import HostImage
from aegaeon_kernels.kv_layout import KVLayout, Plane, packed_copies
from aegaeon_kernels.prefetch import Prefetcher, Ticket

# Programs of a pack or unpack: enough for the link, and decoding goes on beside them.
PROGRAMS = 8
# What calibration copies: runs this long and this short, and so much of each.
LONG_RUN_BYTES, SHORT_RUN_BYTES = 1 << 20, 4 << 10
CALIBRATION_BYTES = 8 << 20


class Path(enum.Enum):
    PIECES = "pieces"
    PACKED = "packed"
    KERNEL = "kernel"


@dataclass(frozen=True)
class PathCost:
    """Of one way in one direction: seconds for a transfer, for each run in it, for each byte."""

    fixed_s: float
    run_s: float
    byte_s: float

    def seconds(self, num_runs: int, num_bytes: int) -> float:
        return self.fixed_s + num_runs * self.run_s + num_bytes * self.byte_s


@dataclass(frozen=True)
class PathRule:
    """What each way costs, in both directions; the ways that there are."""

    store: Mapping[Path, PathCost]
    load: Mapping[Path, PathCost]

    def choose(self, num_runs: int, num_bytes: int, *, store: bool) -> Path:
        """The cheapest way for so many bytes in so many runs."""
        costs = self.store if store else self.load
        return min(costs, key=lambda path: costs[path].seconds(num_runs, num_bytes))


class BlockMover:
    """Copies blocks of paged caches out to a host image and back.

    staging: mapped memory of the same device for packed copies; each half holds at least one block.
    rule: what `calibrate` returned; None: always in pieces.

    In the image blocks are packed (`kv.pack`): block `block_ids[i]` is at `slots[i] *
    bytes_per_block`. Every call returns the way it took, when all bytes are there. It is not
    ordered with the device's other work: who writes or reads the region has to be done before. Not
    for use by several threads at once.
    """

    def __init__(
        self, prefetcher: Prefetcher, staging: Region, rule: PathRule | None = None
    ) -> None:
        self._prefetcher = prefetcher
        self._staging = staging
        self.rule = rule

    @property
    def paths(self) -> tuple[Path, ...]:
        """The ways that there are on this device."""
        if self._prefetcher.device.kind == "host":
            return (Path.PIECES, Path.PACKED, Path.KERNEL)
        return (Path.PIECES, Path.PACKED)

    def store(
        self,
        region: Region,
        layouts: Sequence[KVLayout],
        block_ids: Sequence[int] | npt.NDArray[np.int64],
        image: HostImage,
        slots: Sequence[int] | npt.NDArray[np.int64],
        *,
        path: Path | None = None,
    ) -> Path:
        """Copy blocks of the region to their slots of the image.

        path: the way to take; None: what the rule says. slots: distinct. Raises ValueError for ids
        and slots that are outside, repeated or of unequal number, and for a way that is not there;
        what Ticket.wait raises when a copy fails: then the slots are worth nothing, and no copy is
        on its way any more.
        """
        return self._move(region, layouts, block_ids, image, slots, path, store=True)

    def load(
        self,
        image: HostImage,
        slots: Sequence[int] | npt.NDArray[np.int64],
        region: Region,
        layouts: Sequence[KVLayout],
        block_ids: Sequence[int] | npt.NDArray[np.int64],
        *,
        path: Path | None = None,
    ) -> Path:
        """Copy blocks from their slots of the image into the region; otherwise like store().

        block_ids: distinct; when a copy fails, these blocks are worth nothing.
        """
        return self._move(region, layouts, block_ids, image, slots, path, store=False)

    def calibrate(self, region: Region, image: HostImage, *, rounds: int = 3) -> PathRule:
        """Time every way in both directions, and go by that from now on.

        region, image: scratch: mapped memory and host memory of the kind that will be used, each of
        at least CALIBRATION_BYTES; what is in them is overwritten. Raises ValueError when they are
        too small, and what a failing copy raises.
        """
        for name, size in (("region", region.size_bytes), ("image", image.size_bytes)):
            if size < CALIBRATION_BYTES:
                raise ValueError(
                    f"calibration copies {CALIBRATION_BYTES} bytes, the {name} has {size}"
                )
        self.rule = PathRule(
            *(
                {path: self._cost(path, region, image, rounds, store=store) for path in self.paths}
                for store in (True, False)
            )
        )
        return self.rule

    def _cost(
        self, path: Path, region: Region, image: HostImage, rounds: int, *, store: bool
    ) -> PathCost:
        def seconds(run_bytes: int, num_runs: int) -> float:
            # Every other block, so that no two runs are one.
            layout = KVLayout(
                (Plane(0, run_bytes),), run_bytes, CALIBRATION_BYTES // run_bytes, CALIBRATION_BYTES
            )
            ids = np.arange(num_runs, dtype=np.int64) * 2
            slots = np.arange(num_runs, dtype=np.int64)
            samples = []
            for _ in range(rounds + 1):
                started = time.perf_counter()
                self._move(region, (layout,), ids, image, slots, path, store=store)
                samples.append(time.perf_counter() - started)
            # The first one touches memory, and may compile. What disturbs can only add to the rest.
            return min(samples[1:])

        half = CALIBRATION_BYTES // 2
        num_long, num_short = half // LONG_RUN_BYTES, half // SHORT_RUN_BYTES
        fixed_s = seconds(SHORT_RUN_BYTES, 1)
        byte_s = max(0.0, seconds(LONG_RUN_BYTES, num_long) - fixed_s) / half
        run_s = max(0.0, seconds(SHORT_RUN_BYTES, num_short) - fixed_s - byte_s * half) / num_short
        return PathCost(fixed_s, run_s, byte_s)

    def _move(
        self,
        region: Region,
        layouts: Sequence[KVLayout],
        block_ids: Sequence[int] | npt.NDArray[np.int64],
        image: HostImage,
        slots: Sequence[int] | npt.NDArray[np.int64],
        path: Path | None,
        *,
        store: bool,
    ) -> Path:
        layouts = tuple(layouts)
        ids, places = np.asarray(block_ids, dtype=np.int64), np.asarray(slots, dtype=np.int64)
        pieces = packed_copies(layouts, ids, places)
        written = places if store else ids
        if np.unique(written).size != written.size:
            raise ValueError(f"{'a slot' if store else 'a block'} is written twice")
        per_block = kv.bytes_per_block(layouts)
        if places.size and (int(places.max()) + 1) * per_block > image.size_bytes:
            raise ValueError(
                f"slot {places.max()} of {per_block} bytes lies outside the image of "
                f"{image.size_bytes} bytes"
            )
        if path is None:
            path = Path.PIECES
            if self.rule is not None:
                path = self.rule.choose(len(pieces), ids.size * per_block, store=store)
        if path not in self.paths:
            raise ValueError(f"there is no way {path.value!r} on {self._prefetcher.device.name}")
        if not ids.size:
            return path
        if path is Path.PIECES:
            order = [(int(a), int(b), int(size)) for a, b, size in pieces]
            if store:
                self._prefetcher.store(region, image, order=order).wait()
            else:
                self._prefetcher.load(image, region, order=order).wait()
        elif path is Path.KERNEL:
            buffer = image.tensor()
            if store:
                kv.pack(region, ids, buffer, layouts, slots=places)
            else:
                kv.unpack(buffer, region, ids, layouts, slots=places)
        else:
            self._by_staging(region, layouts, ids, image, places, per_block, store=store)
        return path

    def _by_staging(
        self,
        region: Region,
        layouts: tuple[KVLayout, ...],
        ids: npt.NDArray[np.int64],
        image: HostImage,
        slots: npt.NDArray[np.int64],
        per_block: int,
        *,
        store: bool,
    ) -> None:
        import torch

        half_bytes = self._staging.size_bytes // 2
        per_half = half_bytes // per_block
        if per_half == 0:
            raise ValueError(
                f"half of the staging memory has {half_bytes} bytes, a block {per_block}"
            )
        order = np.argsort(slots, kind="stable")  # neighbours in the image are one copy
        batches = [order[at : at + per_half] for at in range(0, ids.size, per_half)]
        halves = [
            self._staging.tensor((half_bytes,), torch.uint8, offset) for offset in (0, half_bytes)
        ]
        wait = _wait_for_stream(self._staging)
        with _over_at_the_end() as tickets:
            for number, batch in enumerate(batches):
                begin = number % 2 * half_bytes
                copies = _runs(slots[batch], per_block, begin)
                if store:
                    if number >= 2:
                        tickets[number - 2].wait()  # its half is free again
                    kv.pack(region, ids[batch], halves[number % 2], layouts, max_ctas=PROGRAMS)
                    wait()
                    tickets.append(self._prefetcher.store(self._staging, image, order=copies))
                    continue
                if number == 0:
                    tickets.append(self._prefetcher.load(image, self._staging, order=copies))
                tickets[number].wait()
                if number + 1 < len(batches):
                    other = (number + 1) % 2 * half_bytes
                    following = _runs(slots[batches[number + 1]], per_block, other)
                    tickets.append(self._prefetcher.load(image, self._staging, order=following))
                kv.unpack(halves[number % 2], region, ids[batch], layouts, max_ctas=PROGRAMS)
                wait()


@contextmanager
def _over_at_the_end() -> Iterator[list[Ticket]]:
    """Of the tickets put on the list, none is on its way after the block, whatever it raises."""
    tickets: list[Ticket] = []
    try:
        yield tickets
        for ticket in tickets:
            ticket.wait()
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        for ticket in tickets:
            # The first error is the one to report; here only the end of the copies matters.
            with suppress(Error):
                ticket.wait()
        raise


def _runs(slots: npt.NDArray[np.int64], per_block: int, begin: int) -> list[tuple[int, int, int]]:
    """Copies between staging memory from `begin` on and ascending slots of an image."""
    firsts = np.concatenate(([0], np.flatnonzero(np.diff(slots) != 1) + 1))
    lengths = np.diff(np.concatenate((firsts, [slots.size])))
    return [
        (begin + int(at) * per_block, int(slots[at]) * per_block, int(length) * per_block)
        for at, length in zip(firsts, lengths, strict=True)
    ]


def _wait_for_stream(staging: Region) -> Callable[[], None]:
    """For what has been given to torch's current stream of the device; on the host it is over."""
    if staging.arena.device.kind == "host":
        return lambda: None
    import torch

    return lambda: torch.cuda.current_stream(staging.arena.device.name).synchronize()
