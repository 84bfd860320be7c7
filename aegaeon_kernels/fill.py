"""Fills an image with the tensors of safetensors files, in parallel and without a copy between.

It knows files, layouts and images; the reading is native.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from aegaeon_kernels import _C
from aegaeon_kernels.arena import Device
from aegaeon_kernels.errors import IntegrityError
from aegaeon_kernels.host_image import HostImage, OnProgress
from aegaeon_kernels.host_memory import HostPool, positive_threads
from aegaeon_kernels.image_layout import ImageLayout
from aegaeon_kernels.safetensors_file import MAX_NAMED, Checkpoint, StrPath, some

Piece = tuple[int, int, int, int]  # file, offset in it, offset in the image, size


def fill_from_safetensors(
    image: HostImage | None,
    source: Checkpoint | StrPath | Sequence[StrPath],
    *,
    layout: ImageLayout | None = None,
    layers: Mapping[str, Sequence[str]] | None = None,
    tied: Mapping[str, str] | None = None,
    device: Device | None = None,
    pool: HostPool | None = None,
    name: str | None = None,
    num_threads: int | None = None,
    on_progress: OnProgress | None = None,
    verify: bool = False,
) -> HostImage:
    """Read the tensors of a checkpoint into an image, each to its place, and seal it.

    image:   an open one of exactly layout.size_bytes; None: allocated here, with `device`, `pool`
             and `name` as for HostImage.allocate().
    source:  as for Checkpoint.open(): a folder, an index, a file, several, or a checkpoint.
    layout:  where the tensors go; it may leave some of the checkpoint out. None: made of all, with
             `layers` and `tied` as for ImageLayout.build(). The image gets it as its layout_json.
    num_threads: that read; None: as the machine has, up to 8.
    on_progress: called with (bytes done, bytes in total) at most every 50 ms, on this thread; what
             it raises ends the reading.
    verify:  read the files a second time and compare.

    Bytes between tensors become zero. The checksums of the seal are computed as the bytes are read,
    while the cache holds them. Of tied tensors the files may hold several: they are compared.

    Raises ValueError: a layout that does not fit the checkpoint or the image; OSError: what the
    system could not read; IntegrityError: a bad file, one that was written to or cut meanwhile, or
    a difference, with the names of the tensors; what on_progress raises; LifecycleError: the image
    is sealed already; and what allocate() raises. Then the image is not sealed, and what it holds
    is to be forgotten.
    """
    checkpoint = Checkpoint.open(source)
    if layout is None:
        layout = ImageLayout.build(checkpoint.tensors.values(), layers=layers, tied=tied)
    elif layers is not None or tied is not None:
        raise ValueError("layers= and tied= are for making a layout, and one is given")
    reader, comparisons = _readers(checkpoint, layout)
    if verify:
        comparisons.append(reader)
    if layout.size_bytes == 0:
        raise ValueError(f"{checkpoint!r} has no bytes to fill an image with")
    if image is None:
        name = name or checkpoint.files[0].path.absolute().parent.name
        image = HostImage.allocate(layout.size_bytes, device=device, name=name, pool=pool)
    elif device is not None or pool is not None or name is not None:
        raise ValueError("device=, pool= and name= are for an image that is made here")
    _require_size(image, layout)
    differences = reader.fill(
        image,
        layout=layout.to_json(),
        comparisons=comparisons,
        num_threads=positive_threads(num_threads),
        on_progress=_reporter(on_progress, 0, layout.size_bytes * (1 + len(comparisons))),
    )
    _require_none(differences, layout, f"read from {checkpoint!r}")
    return image


def compare_with_safetensors(
    image: HostImage,
    source: Checkpoint | StrPath | Sequence[StrPath],
    *,
    layout: ImageLayout | None = None,
    num_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Raise IntegrityError, with the tensors' names, if the image does not hold what the files do.

    layout: None: the image's layout_json. Other parameters and errors as for
            fill_from_safetensors().
    """
    checkpoint = Checkpoint.open(source)
    if layout is None:
        layout = ImageLayout.from_json(image.layout_json)
    _require_size(image, layout)
    reader, copies = _readers(checkpoint, layout)
    readers = [reader, *copies]
    differences: list[int] = []
    for i, reader in enumerate(readers):
        before, total = i * layout.size_bytes, len(readers) * layout.size_bytes
        differences += reader.differences(
            image,
            num_threads=positive_threads(num_threads),
            on_progress=_reporter(on_progress, before, total),
        )
    _require_none(differences, layout, f"compared with {checkpoint!r}")


def _readers(
    checkpoint: Checkpoint, layout: ImageLayout
) -> tuple[_C.FileReader, list[_C.FileReader]]:
    """What fills an image of that layout, and what compares it with tied tensors stored again."""
    files = [file._file for file in checkpoint.files]
    first: dict[str, Piece] = {}
    copies: dict[str, list[Piece]] = {}
    for placed in layout.tensors.values():
        stored = checkpoint.tensors.get(placed.name)
        if stored is None:
            continue
        if (stored.dtype, stored.shape) != (placed.dtype, placed.shape):
            raise ValueError(
                f"the layout has {placed.dtype} {list(placed.shape)} for tensor {placed.name!r}, "
                f"which is {stored.dtype} {list(stored.shape)}"
            )
        owner = placed.tied_to or placed.name
        piece = (stored.file_idx, stored.offset_bytes, placed.offset_bytes, placed.size_bytes)
        if owner in first:
            copies.setdefault(owner, []).append(piece)
        else:
            first[owner] = piece
    for placed in layout.tensors.values():
        if placed.tied_to is None and placed.name not in first:
            raise ValueError(f"the layout has tensor {placed.name!r}, which is not in the files")
    rounds = zip_longest(*copies.values())  # the pieces of a reader do not overlap
    return (
        _C.FileReader(files=files, pieces=list(first.values())),
        [_C.FileReader(files=files, pieces=[p for p in pieces if p]) for pieces in rounds],
    )


def _require_size(image: HostImage, layout: ImageLayout) -> None:
    if image.size_bytes != layout.size_bytes:
        raise ValueError(f"{image!r} does not have the {layout.size_bytes} bytes of the layout")


def _require_none(differences: Sequence[int], layout: ImageLayout, what: str) -> None:
    if not differences:
        return
    own = [tensor for tensor in layout.tensors.values() if tensor.tied_to is None]
    places = []
    for offset in differences[: MAX_NAMED + 1]:
        tensor = next(tensor for tensor in own if offset < tensor.end_bytes)
        places.append(f"{tensor.name!r} from its byte {offset - tensor.offset_bytes} on")
    raise IntegrityError(f"{what}: the bytes differ: {some(places)}")


def _reporter(
    on_progress: OnProgress | None, before: int, total: int
) -> Callable[[int], object] | None:
    if on_progress is None:
        return None
    return lambda num_bytes: on_progress(before + num_bytes, total)
