"""ImageLayout: places without overlap in the order of execution, and JSON that is not believed."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import MIB

import aegaeon_kernels as ak
from aegaeon_kernels.image_layout import (
    LAYER_ALIGNMENT,
    TENSOR_ALIGNMENT,
    execution_order,
    size_of,
)
from aegaeon_kernels.safetensors_file import DTYPE_BITS


class Spec(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]


NAMES = st.one_of(
    st.builds(
        "{}.{}.{}".format,
        st.sampled_from(["model.layers", "visual.blocks", "h", "mtp.layers"]),
        st.integers(0, 20),
        st.sampled_from(["attn.weight", "mlp.experts.3.up", "norm"]),
    ),
    st.sampled_from(["embed_tokens.weight", "lm_head.weight", "norm.weight", "wte", "é"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)


@st.composite
def specs(draw: st.DrawFn) -> list[Spec]:
    names = draw(st.lists(NAMES, max_size=12, unique=True))
    result = []
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 40), max_size=3))
        if DTYPE_BITS[dtype] < 8:
            shape.append(4)
        result.append(Spec(name, dtype, tuple(shape)))
    return result


@st.composite
def layouts(draw: st.DrawFn) -> ak.ImageLayout:
    tensors = draw(specs())
    tied = {}
    if tensors and draw(st.booleans()):
        owner = draw(st.sampled_from(tensors)).name
        tied = {f"tied {i}": owner for i in range(draw(st.integers(1, 3)))}
    return ak.ImageLayout.build(tensors, tied=tied)


@given(specs())
def test_every_tensor_has_a_place_of_its_own(tensors: list[Spec]) -> None:
    layout = ak.ImageLayout.build(tensors)
    assert sorted(layout.tensors) == sorted(spec.name for spec in tensors)
    end = 0
    for layer in layout.layers:
        assert layer.offset_bytes % LAYER_ALIGNMENT == 0
        assert layer.offset_bytes == -(-end // LAYER_ALIGNMENT) * LAYER_ALIGNMENT, "no slack"
        end = layer.offset_bytes
        for tensor in layer.tensors:
            assert tensor.offset_bytes == -(-end // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
            end = tensor.end_bytes
        assert end == layer.end_bytes
    assert layout.size_bytes == end
    for spec in tensors:
        placed = layout.tensors[spec.name]
        assert (placed.dtype, placed.shape) == (spec.dtype, spec.shape)
        assert placed.size_bytes == size_of(spec.dtype, spec.shape)


@given(specs(), st.randoms())
def test_a_layout_depends_on_the_set_of_tensors_only(tensors: list[Spec], random: Any) -> None:
    shuffled = list(tensors)
    random.shuffle(shuffled)
    assert ak.ImageLayout.build(shuffled).to_json() == ak.ImageLayout.build(tensors).to_json()


@given(layouts())
def test_json_brings_the_same_layout_back(layout: ak.ImageLayout) -> None:
    encoded = layout.to_json()
    again = ak.ImageLayout.from_json(encoded)
    assert again == layout
    assert again.to_json() == encoded
    assert again.size_bytes == layout.size_bytes


@given(layouts(), st.data())
def test_json_with_one_number_changed_is_refused_or_sound(
    layout: ak.ImageLayout, data: st.DataObject
) -> None:
    """Whatever is accepted has passed the checks of a layout that is made here."""
    document = json.loads(layout.to_json())
    places = [(document, "size_bytes")]
    for layer in document["layers"]:
        places += [(layer, "offset_bytes"), (layer, "size_bytes")]
        for tensor in layer["tensors"]:
            places.append((tensor, "offset_bytes"))
            places += [(tensor["shape"], i) for i in range(len(tensor["shape"]))]
    holder, key = data.draw(st.sampled_from(places))
    holder[key] += data.draw(st.sampled_from([-(1 << 16), -256, -1, 1, 256, 1 << 16, 1 << 50]))
    try:
        changed = ak.ImageLayout.from_json(json.dumps(document).encode())
    except ValueError:
        return
    assert ak.ImageLayout(changed.layers) == changed
    own = [tensor for tensor in changed.tensors.values() if tensor.tied_to is None]
    for before, after in itertools.pairwise(own):
        assert before.end_bytes <= after.offset_bytes
    assert all(tensor.end_bytes <= changed.size_bytes for tensor in own)


def test_the_ranges_are_an_order_for_the_prefetcher() -> None:
    tensors = [Spec(f"layers.{i}.w", "F32", (1000 * i,)) for i in range(4)]
    layout = ak.ImageLayout.build([*tensors, Spec("embed.weight", "BF16", (70_000,))])
    assert [layer.name for layer in layout.layers] == [
        "embedding",
        *(f"layers.{i}" for i in range(4)),
    ]
    ranges = layout.ranges()
    assert [size for _, size in ranges] == [140_000, 4000, 8000, 12_000]  # layer 0 is empty
    device = ak.Device("host", memory_bytes=64 * MIB)
    image = ak.HostImage.allocate(layout.size_bytes, device=device)
    memoryview(image)[:] = bytes(i % 251 for i in range(layout.size_bytes))
    with ak.Prefetcher(device) as prefetcher:
        arena = ak.Arena(device, capacity_bytes=2 * MIB)
        region = arena.reserve(2 * MIB, owner="a", tag="weights")
        region.map()
        ticket = prefetcher.load(image, region, order=ranges)
        ticket.wait_bytes(ranges[0].size_bytes, timeout_s=60)
        ticket.wait(timeout_s=60)
        moved = region.tensor((layout.size_bytes,), torch.uint8)
        for offset, size in ranges:
            assert torch.equal(
                moved[offset : offset + size], image.tensor((size,), torch.uint8, offset)
            )
        del moved
        region.close()
        arena.close()


def test_the_order_is_that_of_execution() -> None:
    in_order = [
        "model.embed_tokens.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "model.visual.blocks.1.attn.qkv.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.10.up_proj.weight",
        "model.layers.0.mlp.experts.2.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.10.mlp.up_proj.weight",
        "mtp.layers.0.weight",
        "score.0.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    order = execution_order(reversed(in_order))
    assert [name for names in order.values() for name in names] == in_order
    assert list(order) == [
        "embedding",
        "model.visual.blocks.0",
        "model.visual.blocks.1",
        "model.layers.0",
        "model.layers.2",
        "model.layers.10",
        "mtp.layers.0",
        "score.0",
        "final",
        "head",
    ]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.wte.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("transformer.h.11.ln_1.weight", "transformer.h.11"),
        ("embed_out.weight", "head"),
        ("transformer.ln_f.weight", "final"),
        ("0.weight", "0"),
        (".3.weight", "3"),
        ("a..3.b", "a..3"),
        ("layer_3.weight", "final"),
        (f"layers.{'9' * 5000}.w", "final"),
        ("layers.٣.w", "final"),
    ],
)
def test_where_a_name_belongs(name: str, layer: str) -> None:
    assert execution_order([name]) == {layer: [name]}


@given(st.lists(NAMES, unique=True))
def test_every_name_is_in_one_layer(names: list[str]) -> None:
    order = execution_order(names)
    assert sorted(name for group in order.values() for name in group) == sorted(names)
    assert all(order.values())


def test_the_order_may_be_given() -> None:
    tensors = [Spec("a", "U8", (3,)), Spec("b", "U8", (5,)), Spec("c", "U8", (7,))]
    layout = ak.ImageLayout.build(tensors, layers={"one": ["c"], "none": [], "two": ["a", "b"]})
    assert [(layer.name, layer.offset_bytes, layer.size_bytes) for layer in layout.layers] == [
        ("one", 0, 7),
        ("none", LAYER_ALIGNMENT, 0),
        ("two", LAYER_ALIGNMENT, 256 + 5),
    ]
    for layers, message in [
        ({"one": ["a", "b", "c", "d"]}, "'d' of the order given is not among the tensors"),
        ({"one": ["a", "b"]}, "'c' of the order given is in no layer"),
        ({"one": ["a", "b", "c"], "two": ["a"]}, "'a' is twice in the layers given"),
    ]:
        with pytest.raises(ValueError, match=message):
            ak.ImageLayout.build(tensors, layers=layers)


def test_tied_tensors_share_their_bytes() -> None:
    embedding, head = Spec("embed.weight", "BF16", (10, 4)), Spec("lm_head.weight", "BF16", (10, 4))
    for tensors in ([embedding], [embedding, head]):
        layout = ak.ImageLayout.build(tensors, tied={"lm_head.weight": "embed.weight"})
        assert layout.size_bytes == 80
        assert [layer.name for layer in layout.layers] == ["embedding"]
        placed = layout.tensors["lm_head.weight"]
        assert (placed.offset_bytes, placed.tied_to) == (0, "embed.weight")
        assert ak.ImageLayout.from_json(layout.to_json()) == layout
    for tensors, tied, message in [
        (
            [embedding],
            {"x": "y"},
            "'x' is tied to 'y', which is not a tensor with bytes",
        ),
        ([embedding], {"x": "embed.weight", "z": "x"}, "'z' is tied to 'x', which is not"),
        ([embedding], {"embed.weight": "embed.weight"}, "which is not a tensor with bytes"),
        (
            [embedding, Spec("lm_head.weight", "F16", (10, 4))],
            {"lm_head.weight": "embed.weight"},
            "cannot share the bytes of 'embed.weight', BF16",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            ak.ImageLayout.build(tensors, tied=tied)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("a", "F31", (1,)), "unknown dtype 'F31'; known are BOOL"),
        (Spec("a", "F4", (3,)), "does not end on a byte"),
        (Spec("a", "U8", (-1,)), "is negative"),
        (Spec("a", "U8", (1 << 40, 1 << 40)), "is above"),
        (Spec("\ud800", "U8", (1,)), "surrogates not allowed"),
    ],
)
def test_an_impossible_tensor_is_refused(spec: Spec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ak.ImageLayout.build([spec])


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' occurs twice"):
        ak.ImageLayout.build([Spec("a", "U8", (1,))] * 2)


SOUND = json.loads(
    ak.ImageLayout.build(
        [Spec("l.0.a", "F32", (70,)), Spec("l.0.b", "U8", (0,)), Spec("l.1.c", "BF16", (3, 5))],
        tied={"l.0.t": "l.0.a"},
    ).to_json()
)


def changed(*path: Any, to: Any) -> bytes:
    document = copy.deepcopy(SOUND)
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    if to is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = to
    return json.dumps(document).encode()


TENSORS = ("layers", 0, "tensors")


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff", "codec can't decode"),
        (b"[]", "an image layout has the fields .*, found list"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"kind":1,"kind":2}', "'kind' occurs twice"),
        (changed("kind", to="x"), "its kind is 'x'"),
        (changed("version", to=2), "of version 2; this is a reader of version 1"),
        (changed("version", to=True), "is True, not of type int"),
        (changed("version", to=1.0), "is 1.0, not of type int"),
        (changed("size_bytes", to=1), "says it has 1 bytes; its layers end at 65566"),
        (changed("size_bytes", to=...), "has the fields"),
        (changed("more", to=1), "has the fields"),
        (changed("layers", to={}), "not of type list"),
        (changed("layers", 0, "name", to="l.1"), "layer 'l.1' occurs twice"),
        (changed("layers", 1, "offset_bytes", to=1 << 15), "not on a multiple of 65536"),
        (changed("layers", 1, "offset_bytes", to=0), "overlaps what ends at 512"),
        (changed("layers", 0, "offset_bytes", to=-65536), "overlaps what ends at 0"),
        (changed("layers", 0, "size_bytes", to=511), "ends at 511, its last tensor at 512"),
        (changed("layers", 1, "offset_bytes", to=1 << 60), "overlaps what ends at|above the limit"),
        (changed(*TENSORS, 0, "name", to="l.1.c"), "'l.0.a', which is not in front|occurs twice"),
        (changed(*TENSORS, 0, "name", to="\ud800"), "surrogates not allowed"),
        (changed(*TENSORS, 0, "dtype", to="F9"), "unknown dtype 'F9'"),
        (changed(*TENSORS, 0, "shape", to=[True]), "shape of tensor 'l.0.a' has True"),
        (changed(*TENSORS, 0, "shape", to=[-1]), "is negative"),
        (changed(*TENSORS, 0, "shape", to=[200]), "overlaps what ends at 800|differs"),
        (changed(*TENSORS, 0, "offset_bytes", to=16), "not on a multiple of 256"),
        (changed(*TENSORS, 0, "tied_to", to="l.0.b"), "which is not in front of it"),
        (changed(*TENSORS, 1, "tied_to", to=None), "is None, not of type str"),
        (changed(*TENSORS, 1, "shape", to=[69]), "tied to 'l.0.a' but differs"),
        (changed(*TENSORS, 1, "offset_bytes", to=256), "tied to 'l.0.a' but differs"),
    ],
)
def test_json_that_is_no_layout_is_refused(encoded: bytes, message: str) -> None:
    assert ak.ImageLayout.from_json(json.dumps(SOUND).encode()).tensors["l.0.t"].tied_to == "l.0.a"
    with pytest.raises(ValueError, match=message):
        ak.ImageLayout.from_json(encoded)
