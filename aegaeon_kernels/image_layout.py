"""ImageLayout: where the tensors of a model lie in its image, on the host and on the device alike.

It knows names, types and places; not files, and nothing of a model but the names of its tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

from aegaeon_kernels.kv_layout import ByteRange
from aegaeon_kernels.safetensors_file import DTYPE_BITS, parse_json

if TYPE_CHECKING:
    import torch

    from aegaeon_kernels.host_image import HostImage

TENSOR_ALIGNMENT = 256  # what kernels, vector loads and TMA descriptors want
LAYER_ALIGNMENT = 64 << 10
MAX_SIZE_BYTES = 1 << 46
JSON_KIND = "aegaeon image layout"
JSON_VERSION = 1


class Tensor(Protocol):
    """What build() wants to know of a tensor; StoredTensor is one."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """One tensor and its place: `size_bytes` from `offset_bytes` on, the last axis contiguous.

    tied_to: the tensor whose bytes these are; None: its own.
    """

    name: str
    dtype: str  # by its name in safetensors files
    shape: tuple[int, ...]
    offset_bytes: int
    tied_to: str | None = None

    @property
    def size_bytes(self) -> int:
        return size_of(self.dtype, self.shape)

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes


@dataclass(frozen=True, slots=True)
class Layer:
    """What is moved together and needed together."""

    name: str
    offset_bytes: int
    size_bytes: int
    tensors: tuple[PlacedTensor, ...]

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes


@dataclass(frozen=True)
class ImageLayout:
    """Layers in the order in which a model runs them; made by build() or from_json().

    Tensors start on multiples of 256 bytes, layers on multiples of 64 KiB. A layer spans from its
    first tensor to the end of its last; the image ends where its last layer does. Tied tensors have
    one place.

    Raises ValueError for a layout that breaks one of these rules: unknown dtypes, names that occur
    twice, places that are misaligned, overlap or lie outside.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def build(
        cls,
        tensors: Iterable[Tensor],
        *,
        layers: Mapping[str, Sequence[str]] | None = None,
        tied: Mapping[str, str] | None = None,
    ) -> Self:
        """Place tensors one behind the other, in the order in which they are needed.

        tensors: with name, dtype and shape: StoredTensors, or anything like them.
        layers:  names of layers and, for each, of its tensors, every one exactly once, all in
                 order. None: by the names, see execution_order().
        tied:    tensor -> the tensor whose bytes it shares. The former need not be among `tensors`;
                 if it is, both have the same type and shape. It takes no place of its own.
        Raises ValueError.
        """
        by_name: dict[str, Tensor] = {}
        for tensor in tensors:
            if tensor.name in by_name:
                raise ValueError(f"tensor {tensor.name!r} occurs twice")
            by_name[tensor.name] = tensor
        tied = dict(tied or {})
        _check_tied(tied, by_name)
        own = [name for name in by_name if name not in tied]
        if layers is None:
            layers = execution_order(own)
        else:
            _check_layers(layers, own)
        aliases: dict[str, list[str]] = {}
        for alias, owner in tied.items():
            aliases.setdefault(owner, []).append(alias)

        placed: list[Layer] = []
        end = 0
        for layer_name, names in layers.items():
            start = _align(end, LAYER_ALIGNMENT)
            own_tensors = _place(start, [by_name[name] for name in names])
            end = own_tensors[-1].end_bytes if own_tensors else start
            with_tied = [
                tensor
                for own_tensor in own_tensors
                for tensor in (own_tensor, *_tie(own_tensor, aliases.get(own_tensor.name, ())))
            ]
            placed.append(Layer(layer_name, start, end - start, tuple(with_tied)))
        return cls(tuple(placed))

    @property
    def size_bytes(self) -> int:
        return self.layers[-1].end_bytes if self.layers else 0

    @cached_property
    def tensors(self) -> Mapping[str, PlacedTensor]:
        """By name, in the order of their places."""
        return MappingProxyType(
            {tensor.name: tensor for layer in self.layers for tensor in layer.tensors}
        )

    def ranges(self) -> list[ByteRange]:
        """The bytes of each layer that has any: the `order` for a Prefetcher."""
        return [
            ByteRange(layer.offset_bytes, layer.size_bytes)
            for layer in self.layers
            if layer.size_bytes
        ]

    def tensor(self, image: HostImage, name: str) -> torch.Tensor:
        """One tensor as a torch CPU tensor over the image's bytes, without a copy.

        F4 comes as torch.float4_e2m1fn_x2, two in an element of the last axis. Raises ValueError
        for a dtype that torch has no name for (F6), KeyError for an unknown name.
        """
        placed = self.tensors[name]
        return _as_torch(image, placed)

    def to_json(self) -> bytes:
        """For from_json(). The same layout gives the same bytes."""
        document = {
            "kind": JSON_KIND,
            "version": JSON_VERSION,
            "size_bytes": self.size_bytes,
            "layers": [
                {
                    "name": layer.name,
                    "offset_bytes": layer.offset_bytes,
                    "size_bytes": layer.size_bytes,
                    "tensors": [_tensor_to_json(tensor) for tensor in layer.tensors],
                }
                for layer in self.layers
            ],
        }
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, encoded: bytes) -> Self:
        """What to_json() made, checked like anything that comes from outside. Raises ValueError."""
        document = _fields(
            parse_json(encoded),
            {"kind": str, "version": int, "size_bytes": int, "layers": list},
            "an image layout",
        )
        if document["kind"] != JSON_KIND:
            raise ValueError(f"not an image layout: its kind is {document['kind']!r}")
        if document["version"] != JSON_VERSION:
            raise ValueError(
                f"an image layout of version {document['version']}; this is a reader of version "
                f"{JSON_VERSION}"
            )
        layout = cls(tuple(_layer_from_json(layer) for layer in document["layers"]))
        if layout.size_bytes != document["size_bytes"]:
            raise ValueError(
                f"an image layout says it has {document['size_bytes']} bytes; its layers end at "
                f"{layout.size_bytes}"
            )
        return layout


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor. Raises ValueError: unknown dtype, impossible shape."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    num_bits = DTYPE_BITS[dtype]
    for dim in (0,) if 0 in shape else shape:
        if dim < 0:
            raise ValueError(f"the shape {list(shape)} is negative")
        num_bits *= dim
        if num_bits > 8 * MAX_SIZE_BYTES:
            raise ValueError(f"a tensor of shape {list(shape)} is above {MAX_SIZE_BYTES} bytes")
    if num_bits % 8:
        raise ValueError(f"a tensor of {dtype} and shape {list(shape)} does not end on a byte")
    return num_bits // 8


# ---- the order of execution, by names ----------------------------------------------------------

EMBEDDING = re.compile(r"embed(?!_out)|\bw[tp]e\b")
HEAD = re.compile(r"\b(lm_head|embed_out|output|head|score|classifier)\b")
ENCODER = re.compile(r"vision|visual|audio|encoder")
NUMBERED = re.compile(r"(?P<stack>.*?)\.?\b(?P<idx>[0-9]{1,9})(?=\.|$)", re.DOTALL)


def execution_order(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers and their tensors, in the order in which a model runs them, by the names.

    1. "embedding": names without a number that mention an embedding (embed, wte, wpe).
    2. A layer for each number: `model.layers.3.mlp.experts.7.up` belongs to `model.layers.3`, as
       the first number between dots counts. Stacks that feed others (vision, visual, audio,
       encoder) come first, heads last, else by name; within a stack by number.
    3. "final": the other names without a number, such as the last norm.
    4. "head": names without a number of which a part is lm_head, embed_out, output, head, score or
       classifier.

    Within a layer by name, which is also the order in which checkpoints are commonly written. It
    depends on the set of names only. Empty groups are left out.
    """
    groups: dict[tuple[int, int, str, int], list[str]] = {}
    for name in sorted(names):
        groups.setdefault(_group_of(name), []).append(name)
    return {_title_of(group): groups[group] for group in sorted(groups)}


def _group_of(name: str) -> tuple[int, int, str, int]:
    numbered = NUMBERED.match(name)
    if numbered:
        stack = numbered["stack"]
        position = 0 if ENCODER.search(stack) else 2 if HEAD.search(stack) else 1
        return 1, position, stack, int(numbered["idx"])
    if EMBEDDING.search(name):
        return 0, 0, "", 0
    return (3 if HEAD.search(name) else 2), 0, "", 0


def _title_of(group: tuple[int, int, str, int]) -> str:
    rank, _, stack, idx = group
    if rank != 1:
        return {0: "embedding", 2: "final", 3: "head"}[rank]
    return f"{stack}.{idx}" if stack else str(idx)


# ---- places and checks -------------------------------------------------------------------------


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _place(start: int, tensors: Iterable[Tensor]) -> list[PlacedTensor]:
    placed = []
    end = start
    for tensor in tensors:
        offset = _align(end, TENSOR_ALIGNMENT)
        placed.append(PlacedTensor(tensor.name, tensor.dtype, tuple(tensor.shape), offset))
        end = placed[-1].end_bytes
    return placed


def _tie(owner: PlacedTensor, aliases: Iterable[str]) -> list[PlacedTensor]:
    return [replace(owner, name=alias, tied_to=owner.name) for alias in aliases]


def _check_tied(tied: Mapping[str, str], by_name: Mapping[str, Tensor]) -> None:
    for alias, owner in tied.items():
        if owner not in by_name or owner in tied:
            raise ValueError(
                f"{alias!r} is tied to {owner!r}, which is not a tensor with bytes of its own"
            )
        other, mine = by_name[owner], by_name.get(alias)
        if mine and (mine.dtype, tuple(mine.shape)) != (other.dtype, tuple(other.shape)):
            raise ValueError(
                f"{alias!r}, {mine.dtype} {list(mine.shape)}, cannot share the bytes of {owner!r}, "
                f"{other.dtype} {list(other.shape)}"
            )


def _check_layers(layers: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    given = [name for layer in layers.values() for name in layer]
    if len(set(given)) != len(given):
        twice = next(name for name in given if given.count(name) > 1)
        raise ValueError(f"tensor {twice!r} is twice in the layers given")
    for name in set(given).symmetric_difference(names):
        where = "not among the tensors" if name in given else "in no layer"
        raise ValueError(f"tensor {name!r} of the order given is {where}")


def _check(layout: ImageLayout) -> None:
    names: set[str] = set()
    layer_names: set[str] = set()
    end = 0
    for layer in layout.layers:
        what = f"layer {layer.name!r}"
        _check_name(what, layer.name, layer_names)
        _check_place(what, layer.offset_bytes, LAYER_ALIGNMENT, end)
        end = _check_tensors(layer, names)
        if layer.end_bytes != end:
            raise ValueError(f"{what} ends at {layer.end_bytes}, its last tensor at {end}")
        if end > MAX_SIZE_BYTES:
            raise ValueError(f"{what} ends at {end}, above the limit of {MAX_SIZE_BYTES}")


def _check_tensors(layer: Layer, names: set[str]) -> int:
    """The end of the last one. `names`: of the layers in front, to which these are added."""
    end = layer.offset_bytes
    own: dict[str, PlacedTensor] = {}
    for tensor in layer.tensors:
        what = f"tensor {tensor.name!r}"
        _check_name(what, tensor.name, names)
        if tensor.tied_to is None:
            _check_place(what, tensor.offset_bytes, TENSOR_ALIGNMENT, end)
            own[tensor.name] = tensor
            end = tensor.end_bytes
            continue
        owner = own.get(tensor.tied_to)
        if owner is None:
            raise ValueError(f"{what} is tied to {tensor.tied_to!r}, which is not in front of it")
        if (tensor.offset_bytes, tensor.dtype, tensor.shape) != (
            owner.offset_bytes,
            owner.dtype,
            owner.shape,
        ):
            raise ValueError(f"{what} is tied to {tensor.tied_to!r} but differs from it")
    return end


def _check_name(what: str, name: str, taken: set[str]) -> None:
    """Adds it to those taken."""
    if name in taken:
        raise ValueError(f"{what} occurs twice")
    name.encode()  # half a surrogate pair, which JSON can bring, is a UnicodeEncodeError
    taken.add(name)


def _check_place(what: str, offset_bytes: int, alignment: int, end: int) -> None:
    if offset_bytes % alignment:
        raise ValueError(f"{what} at {offset_bytes} is not on a multiple of {alignment}")
    if offset_bytes < end:
        raise ValueError(f"{what} at {offset_bytes} overlaps what ends at {end}")


# ---- JSON --------------------------------------------------------------------------------------


def _tensor_to_json(tensor: PlacedTensor) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "offset_bytes": tensor.offset_bytes,
    }
    if tensor.tied_to is not None:
        fields["tied_to"] = tensor.tied_to
    return fields


def _layer_from_json(value: Any) -> Layer:
    fields = _fields(
        value, {"name": str, "offset_bytes": int, "size_bytes": int, "tensors": list}, "a layer"
    )
    tensors = tuple(_tensor_from_json(tensor) for tensor in fields["tensors"])
    return Layer(fields["name"], fields["offset_bytes"], fields["size_bytes"], tensors)


def _tensor_from_json(value: Any) -> PlacedTensor:
    wanted: dict[str, type] = {"name": str, "dtype": str, "shape": list, "offset_bytes": int}
    if isinstance(value, dict) and "tied_to" in value:
        wanted["tied_to"] = str
    fields = _fields(value, wanted, "a tensor")
    for dim in fields["shape"]:
        if type(dim) is not int:
            raise ValueError(f"shape of tensor {fields['name']!r} has {dim!r}, not an integer")
    fields["shape"] = tuple(fields["shape"])
    return PlacedTensor(**fields)


def _fields(value: Any, wanted: Mapping[str, type], what: str) -> dict[str, Any]:
    """`value` as an object of exactly these fields and types; a bool is not an int."""
    if not isinstance(value, dict) or value.keys() != wanted.keys():
        found = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} has the fields {', '.join(wanted)}, found {found}")
    for name, kind in wanted.items():
        if type(value[name]) is not kind:
            raise ValueError(f"{name} of {what} is {value[name]!r}, not of type {kind.__name__}")
    return value


# ---- torch -------------------------------------------------------------------------------------


def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "BOOL": torch.bool,
        "F4": torch.float4_e2m1fn_x2,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "C64": torch.complex64,
        "F64": torch.float64,
        "I64": torch.int64,
        "U64": torch.uint64,
    }


def _as_torch(image: HostImage, placed: PlacedTensor) -> torch.Tensor:
    import torch

    dtype = _torch_dtypes().get(placed.dtype)
    if dtype is None:
        raise ValueError(f"torch has no dtype for {placed.dtype}, that of {placed.name!r}")
    shape = list(placed.shape)
    if placed.dtype == "F4":  # two elements in one of torch's
        shape[-1] //= 2
    if placed.size_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    data = image.tensor((placed.size_bytes,), torch.uint8, placed.offset_bytes)
    return data.view(dtype).reshape(shape)
