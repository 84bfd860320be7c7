"""KV layouts of all kinds, in miniature, and caches to try them on."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from aegaeon_kernels import kv_copy
from aegaeon_kernels.kv_layout import KVLayout, Plane

GUARD_BYTES = 64
GUARD = 0xA5
NUM_BLOCKS = 24


class Sample(NamedTuple):
    """The layouts of one cache, and the sizes of its allocations."""

    layouts: tuple[KVLayout, ...]
    part_bytes: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return sum(self.part_bytes)


def layer_outermost(page: int, layers: int, *, blocks: int = NUM_BLOCKS, stride: int = 0) -> Sample:
    """[layers][blocks][page]: one tensor per layer, or K and V halves, or heads, as planes."""
    stride = stride or page
    size = layers * blocks * stride
    planes = tuple(Plane(layer * blocks * stride, stride) for layer in range(layers))
    return Sample((KVLayout(planes, page, blocks, size),), (size,))


def block_outermost(
    page: int, layers: int, *, gap: int = 0, blocks: int = NUM_BLOCKS, padding: int = 0
) -> Sample:
    """[blocks][layers][page]: `gap` bytes between pages, `padding` at the end of a block."""
    stride = layers * (page + gap) + padding
    planes = tuple(Plane(layer * (page + gap), stride) for layer in range(layers))
    return Sample((KVLayout(planes, page, blocks, blocks * stride),), (blocks * stride,))


def side_by_side(*samples: Sample) -> Sample:
    """One allocation with several caches in it that share their block ids."""
    size = sum(sample.size_bytes for sample in samples)
    layouts: list[KVLayout] = []
    begin = 0
    for sample in samples:
        for layout in sample.layouts:
            planes = tuple(Plane(offset + begin, stride) for offset, stride in layout.planes)
            layouts.append(KVLayout(planes, layout.block_bytes, layout.num_blocks, size))
        begin += sample.size_bytes
    return Sample(tuple(layouts), (size,))


def overlaid(*pages_and_layers: tuple[int, int]) -> Sample:
    """Cache groups that share the bytes of a block, as in vLLM's block-outermost hybrid caches."""
    stride = max(page * layers for page, layers in pages_and_layers) + 32
    size = NUM_BLOCKS * stride
    layouts = tuple(
        KVLayout(tuple(Plane(i * page, stride) for i in range(layers)), page, NUM_BLOCKS, size)
        for page, layers in pages_and_layers
    )
    return Sample(layouts, (size,))


def in_tensors(sample: Sample, num_parts: int) -> Sample:
    """The same cache in so many allocations of equal size."""
    return Sample(sample.layouts, (sample.size_bytes // num_parts,) * num_parts)


# [layers, blocks, heads, slots, channels] in bytes: 3 layers, pages of 256 bytes.
SAMPLES: dict[str, Sample] = {
    "per layer, NHD or HND": layer_outermost(256, 3),
    "per layer, K and V halves": layer_outermost(128, 6),
    "per head": layer_outermost(64, 12),
    "per layer, own allocations": in_tensors(layer_outermost(256, 4), 4),
    "own allocations, odd pages": in_tensors(layer_outermost(77, 2), 2),
    "per layer, padded pages": layer_outermost(208, 3, stride=256),
    "block outermost": block_outermost(256, 3),
    "block outermost, padded blocks": block_outermost(240, 3, padding=48),
    "block outermost, gaps between layers": block_outermost(96, 3, gap=8),
    "MLA, fp8 rows of 656 bytes": layer_outermost(656, 2),
    "MLA rows of 576 bytes, block outermost": block_outermost(576, 2, gap=64),
    "pages of 130 bytes": layer_outermost(130, 3),
    "pages of 1 byte": layer_outermost(1, 5),
    "fp8 with scales beside": side_by_side(layer_outermost(256, 3), layer_outermost(12, 3)),
    "hybrid, two page sizes": side_by_side(layer_outermost(512, 2), layer_outermost(352, 1)),
    "hybrid, groups overlay each other": overlaid((256, 3), (320, 2), (24, 5)),
    "mamba states beside attention": side_by_side(
        layer_outermost(1048, 2, stride=1056), block_outermost(128, 2, padding=16)
    ),
    "one block": layer_outermost(48, 3, blocks=1),
    "several tiles a page, ragged end": layer_outermost(4096 * 2 + 1040, 2, blocks=6),
}


def random_bytes(size_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=generator)


class Guarded:
    """Memory with guard bytes around it; `tensors` are the parts, each at a multiple of 16."""

    def __init__(self, part_bytes: tuple[int, ...], seed: int) -> None:
        spaced = [GUARD_BYTES + (size + 15) // 16 * 16 for size in part_bytes]
        storage = torch.full((sum(spaced) + GUARD_BYTES + 16,), GUARD, dtype=torch.uint8)
        begin = GUARD_BYTES + -storage.data_ptr() % 16
        self.storage = storage
        self.tensors = []
        for size, step in zip(part_bytes, spaced, strict=True):
            self.tensors.append(storage[begin : begin + size])
            self.tensors[-1].copy_(random_bytes(size, seed))
            begin += step
            seed += 1

    @property
    def cache(self) -> torch.Tensor | list[torch.Tensor]:
        """As the operations take it."""
        return self.tensors[0] if len(self.tensors) == 1 else self.tensors

    def flat(self) -> torch.Tensor:
        """A copy of the parts laid end to end."""
        return torch.cat(self.tensors)

    def assert_is(self, expected: torch.Tensor) -> None:
        """The parts hold these bytes, and no guard byte has changed."""
        assert torch.equal(self.flat(), expected)
        for tensor in self.tensors:
            tensor.fill_(GUARD)
        assert bool((self.storage == GUARD).all()), "a byte beside the cache was overwritten"


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel in Triton's interpreter, without deciding so for the whole process."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(
        kv_copy, "copy_pages_kernel", InterpretedFunction(kv_copy.copy_pages_kernel.fn)
    )
