"""How soon are a checkpoint's bytes in host memory, from the page cache?

    pytest bench/bench_fill.py          (with --keep-results the figures go to results/)

Limit: the kernel copies each byte once, so reading cannot be faster than `pread` of the whole files
into memory that is there already, by as many threads as there are cores. The peers bring the same
tensors from the same files, in turns: the safetensors library, vLLM's own iterator over its weights
and Run:ai's model streamer into tensors that are there already, as a loader does with parameters;
fastsafetensors (without GPUDirect Storage) into the buffers it makes. Ours ends with an image that
is sealed: a checksum of every chunk is part of its time. Goal: faster than each of them.
"""

import ctypes
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import paired_ratio, quantiles
from safetensors import safe_open
from safetensors.torch import save_file

import aegaeon_kernels as ak

MIB = 1 << 20
NUM_SHARDS, NUM_LAYERS, ROUNDS = 2, 12, 5
SIZES = {"attention": 8 * MIB, "mlp": 24 * MIB, "norm": 8192, "bias": 2048}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shards of 384 MiB in all, written a moment ago and so in the page cache."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random = torch.Generator().manual_seed(1)
    shards: list[Tensors] = [{} for _ in range(NUM_SHARDS)]
    for layer in range(NUM_LAYERS):
        for part, size in SIZES.items():
            noise = torch.randint(256, (size,), dtype=torch.uint8, generator=random)
            name = f"model.layers.{layer}.{part}.weight"
            shards[layer * NUM_SHARDS // NUM_LAYERS][name] = noise.view(torch.bfloat16)
    paths = []
    for i, tensors in enumerate(shards):
        paths.append(folder / f"model-{i + 1:05}-of-{NUM_SHARDS:05}.safetensors")
        save_file(tensors, paths[-1])
    return paths


@pytest.fixture(scope="module")
def parameters(files: list[Path]) -> Tensors:
    """What peers load into: there and touched, as a model's parameters are."""
    made: Tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                shape = opened.get_slice(name).get_shape()
                made[name] = torch.ones(shape, dtype=torch.bfloat16)
    return made


class Filled:
    """Ours: one image after the other in a pool that was made at start."""

    def __init__(self, files: list[Path]) -> None:
        self._checkpoint = ak.Checkpoint.open(files)
        self._layout = ak.ImageLayout.build(self._checkpoint.tensors.values())
        self._pool = ak.HostPool(ak.Device("host", memory_bytes=2 * MIB), 512 * MIB)
        self.image: ak.HostImage | None = None

    def __call__(self) -> None:
        self.image = None
        self.image = ak.fill_from_safetensors(
            None, self._checkpoint, layout=self._layout, pool=self._pool
        )
        assert self.image.sealed

    def bytes_of(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        assert self.image is not None
        placed = self._layout.tensors[name]
        whole = np.frombuffer(self.image, np.uint8)
        return whole[placed.offset_bytes :][: placed.size_bytes]


def pread_all(files: list[Path]) -> Callable[[], None]:
    buffers = [torch.ones(file.stat().st_size, dtype=torch.uint8) for file in files]

    def read(file: Path, buffer: torch.Tensor) -> None:
        view = memoryview(buffer.numpy())
        fd = os.open(file, os.O_RDONLY)
        done = 0
        while done < len(view):
            done += os.preadv(fd, [view[done : done + 8 * MIB]], done)
        os.close(fd)

    def run() -> None:
        threads = [
            threading.Thread(target=read, args=pair) for pair in zip(files, buffers, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def memcpy_all(files: list[Path]) -> Callable[[], None]:
    size = sum(file.stat().st_size for file in files)
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    return lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), size) and None


def into(parameters: Tensors, loaded: Iterator[tuple[str, torch.Tensor]]) -> None:
    count = 0
    for name, tensor in loaded:
        parameters[name].copy_(tensor)
        count += 1
    assert count == len(parameters)


def by_safetensors(files: list[Path], parameters: Tensors) -> None:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                parameters[name].copy_(opened.get_tensor(name))


def by_vllm(files: list[Path], parameters: Tensors) -> None:
    utils = importlib.import_module("vllm.model_executor.model_loader.weight_utils")
    names = [str(file) for file in files]
    into(parameters, utils.safetensors_weights_iterator(names, use_tqdm_on_load=False))


def by_runai(files: list[Path], parameters: Tensors) -> None:
    streamers = importlib.import_module("runai_model_streamer")
    with streamers.SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files])
        into(parameters, streamer.get_tensors())


def by_fastsafetensors(files: list[Path], parameters: Tensors) -> None:
    parameters.pop("check", None)
    fast = importlib.import_module("fastsafetensors")
    loader = fast.SafeTensorsFileLoader(fast.SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [str(file) for file in files]})
    buffers = loader.copy_files_to_device()
    for name, parameter in parameters.items():
        assert buffers.get_tensor(name).shape == parameter.shape
    parameters["check"] = buffers.get_tensor(next(iter(parameters))).clone()
    buffers.close()
    loader.close()


PEERS: dict[str, tuple[str, Callable[[list[Path], Tensors], None]]] = {
    "safetensors": ("safetensors", by_safetensors),
    "vllm": ("vllm", by_vllm),
    "runai": ("runai_model_streamer", by_runai),
    "fastsafetensors": ("fastsafetensors", by_fastsafetensors),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers' own
@pytest.mark.parametrize("peer", PEERS)
def test_filling_an_image(
    peer: str, files: list[Path], parameters: Tensors, record: Callable[..., None]
) -> None:
    module, load = PEERS[peer]
    pytest.importorskip(module)
    ours = Filled(files)
    contestants: dict[str, Callable[[], Any]] = {
        "aegaeon": ours,
        peer: lambda: load(files, parameters),
        "pread": pread_all(files),
        "memcpy": memcpy_all(files),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_idx in range(ROUNDS + 1):  # the first one warms up
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if round_idx > 0:
                seconds[name].append(time.perf_counter() - started)
    only = parameters.pop("check", None)  # what closed buffers have left of one tensor
    for name in list(parameters) if only is None else list(parameters)[:1]:
        expected = parameters[name] if only is None else only
        assert np.array_equal(ours.bytes_of(name), expected.view(torch.uint8).numpy())
    record(
        f"fill, {sum(file.stat().st_size for file in files) / MIB:.0f} MiB, against {peer}",
        None,
        ours_to_peer=paired_ratio(seconds["aegaeon"], seconds[peer]),
        ours_to_pread=paired_ratio(seconds["aegaeon"], seconds["pread"]),
        ours_to_memcpy=paired_ratio(seconds["aegaeon"], seconds["memcpy"]),
        **{
            key: value
            for name, times in seconds.items()
            for key, value in quantiles(f"{name}_ms", times).items()
        },
    )
