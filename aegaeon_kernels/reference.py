"""What moving KV blocks means, byte by byte in plain torch: the definition of correct.

Slow, on any device, and independent of how the fast paths cut blocks into pages. The operations of
`aegaeon_kernels.kv` leave exactly these bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aegaeon_kernels.kv_layout import KVLayout


def pack(
    cache: torch.Tensor, block_ids: Sequence[int], out: torch.Tensor, layouts: Sequence[KVLayout]
) -> None:
    """out[i] becomes the bytes of block `block_ids[i]`, ascending, each once.

    cache: the allocation of the layouts. out: (>= len(block_ids) * bytes per block) bytes. Both
    contiguous, of any dtype.
    """
    packed = _bytes_of(cache)[_positions(block_ids, layouts, cache.device)]
    _bytes_of(out)[: packed.numel()] = packed.reshape(-1)


def unpack(
    buf: torch.Tensor, cache: torch.Tensor, block_ids: Sequence[int], layouts: Sequence[KVLayout]
) -> None:
    """The inverse: block `block_ids[i]` gets the bytes of packed block i; ids are distinct."""
    positions = _positions(block_ids, layouts, cache.device)
    packed = _bytes_of(buf)[: positions.numel()]
    _bytes_of(cache)[positions] = packed.reshape(positions.shape)


def move(
    cache: torch.Tensor,
    src_ids: Sequence[int],
    dst_ids: Sequence[int],
    layouts: Sequence[KVLayout],
) -> None:
    """Block `dst_ids[i]` gets the bytes that block `src_ids[i]` had before; all at once."""
    source = _positions(src_ids, layouts, cache.device)
    destination = _positions(dst_ids, layouts, cache.device)
    _bytes_of(cache)[destination] = _bytes_of(cache)[source]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _positions(
    block_ids: Sequence[int], layouts: Sequence[KVLayout], device: torch.device
) -> torch.Tensor:
    """(blocks, bytes per block): where in the cache each byte of each block is."""
    strides = {
        offset_bytes + byte: block_stride_bytes
        for layout in layouts
        for offset_bytes, block_stride_bytes in layout.planes
        for byte in range(layout.block_bytes)
    }
    first, stride = torch.tensor(sorted(strides.items()), device=device).T
    ids = torch.tensor(list(block_ids), dtype=torch.int64, device=device)
    positions: torch.Tensor = first + ids[:, None] * stride
    return positions
