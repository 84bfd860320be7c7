"""GPUs and models as the simulator knows them: bytes, bytes per second, seconds per step.

Step and prefill times are the published profiles (`sched.cost`). Where a pair of model and GPU has
none it is scaled from the published model of that GPU whose weights are nearest: steps by weights
bytes per GPU (they are read once per step), prefills likewise. To a published step, whose fit says
nothing about context, the reading of the KV cache is added: bytes / HBM bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from aegaeon.core.slo import TokenDeadlines
from aegaeon.sched.cost import (
    PCIE4_BYTES_PER_S,
    PCIE5_BYTES_PER_S,
    PUBLISHED,
    PUBLISHED_LINK_SHARE,
    Profile,
)

GB = 10**9


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory_bytes: of the device, all of it. link_bytes_per_s: nominal, from the host."""

    name: str
    memory_bytes: int
    link_bytes_per_s: float
    hbm_bytes_per_s: float


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H800", 80 * GB, PCIE5_BYTES_PER_S, 3.35e12),
        Gpu("H100", 80 * GB, PCIE5_BYTES_PER_S, 3.35e12),
        Gpu("H200", 141 * GB, PCIE5_BYTES_PER_S, 4.8e12),
        Gpu("A100", 80 * GB, PCIE4_BYTES_PER_S, 2.0e12),
        Gpu("H20", 96 * GB, PCIE4_BYTES_PER_S, 4.0e12),
        Gpu("A10", 24 * GB, PCIE4_BYTES_PER_S, 0.6e12),
    )
}
# Whose profiles stand for those of a GPU without any: the same chip with other memory.
_PROFILED_AS = {"H200": "H100"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A checkpoint: its weights, the KV cache of one token, and the KV cache it gets by default."""

    name: str
    weights_bytes: int
    kv_bytes_per_token: int
    kv_memory_bytes: int


# KV per token: 2 x layers x KV heads x head size x 2 bytes. The KV caches of the first four are
# chosen so that two of these models, and not three, fit into 90 % of 80 GB.
SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("Qwen2.5-7B", 152 * GB // 10, 57_344, 20 * GB),
        Shape("Yi-1.5-9B", 177 * GB // 10, 98_304, 18 * GB),
        Shape("Llama-2-13B", 26 * GB, 819_200, 10 * GB),
        Shape("Yi-1.5-6B", 121 * GB // 10, 65_536, 20 * GB),
        Shape("Qwen1.5-1.8B", 37 * GB // 10, 196_608, 10 * GB),
        Shape("Qwen2.5-32B", 655 * GB // 10, 262_144, 40 * GB),
        Shape("Qwen2.5-72B", 1454 * GB // 10, 327_680, 60 * GB),
    )
}


_USUAL = TokenDeadlines()


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a pool. Weights and KV cache are spread evenly over its `tp` GPUs.

    profile: None: the published one of its shape on the GPU, or one scaled from it.
    """

    name: str
    weights_bytes: int
    kv_bytes_per_token: int
    kv_memory_bytes: int
    shape: str = ""
    tp: int = 1
    deadlines: TokenDeadlines = _USUAL
    priority: int = 0
    profile: Profile | None = None

    @classmethod
    def of(cls, name: str, shape: str, *, tp: int = 1, priority: int = 0) -> Model:
        """A model of a known shape. Raises KeyError for an unknown one."""
        known = SHAPES[shape]
        return cls(
            name=name,
            weights_bytes=known.weights_bytes,
            kv_bytes_per_token=known.kv_bytes_per_token,
            kv_memory_bytes=known.kv_memory_bytes,
            shape=shape,
            tp=tp,
            priority=priority,
        )

    @property
    def device_bytes(self) -> int:
        """On all its GPUs together, when resident."""
        return self.weights_bytes + self.kv_memory_bytes

    @property
    def kv_tokens(self) -> int:
        """What its KV cache holds."""
        if not self.kv_bytes_per_token:
            return 1 << 62
        return self.kv_memory_bytes // self.kv_bytes_per_token

    def scaled(self, factor: float) -> Model:
        """With deadlines multiplied by `factor`."""
        return replace(self, deadlines=self.deadlines.scaled(factor))


@dataclass(frozen=True, slots=True)
class GpuGroup:
    """`instances` engines, each on `tp` GPUs of one kind; `num_prefill` of them only prefill where
    the policy separates the phases.

    memory_share: of the device, for weights and KV cache. link_share: of the nominal bandwidth.
    switch_s: fixed time of each switch to a model that is not resident, on top of the bytes.
    prefetch: whether models may be brought in ahead of their turn.
    """

    gpu: Gpu
    instances: int
    tp: int = 1
    num_prefill: int = 0
    memory_share: float = 0.9
    link_share: float = PUBLISHED_LINK_SHARE
    switch_s: float = 0.0
    prefetch: bool = True

    @property
    def num_gpus(self) -> int:
        return self.instances * self.tp

    @property
    def capacity_bytes(self) -> int:
        """What the models of one instance share."""
        return int(self.gpu.memory_bytes * self.memory_share) * self.tp

    @property
    def link_bytes_per_s(self) -> float:
        """Of one instance: each GPU loads its part."""
        return self.gpu.link_bytes_per_s * self.link_share * self.tp

    def sized(self, instances: int) -> GpuGroup:
        """With another number of instances, as much of it for prefill as before."""
        share = self.num_prefill / self.instances
        prefill = min(instances - 1, max(1, round(share * instances))) if self.num_prefill else 0
        return replace(self, instances=instances, num_prefill=prefill)


def profile_of(model: Model, gpu: Gpu) -> Profile:
    """Seconds of the model's steps and prefills on this GPU, `tp` of them together."""
    if model.profile is not None:
        return model.profile
    profiled = _PROFILED_AS.get(gpu.name, gpu.name)
    per_gpu_bytes = model.weights_bytes / model.tp
    context_s = model.kv_bytes_per_token / model.tp / gpu.hbm_bytes_per_s
    published = PUBLISHED.get((model.shape, profiled))
    if published is not None and model.tp == 1:
        return replace(published, step_per_context_token_s=context_s)
    known = [shape for shape, name in PUBLISHED if name == profiled]
    if not known:
        raise ValueError(
            f"no profile of {model.name!r} on {gpu.name}, nor one to scale: give the model one"
        )
    nearest = min(known, key=lambda shape: abs(SHAPES[shape].weights_bytes - per_gpu_bytes))
    base = PUBLISHED[nearest, profiled]
    factor = per_gpu_bytes / SHAPES[nearest].weights_bytes
    return Profile(
        step_s=base.step_s * factor,
        step_per_request_s=base.step_per_request_s * factor,
        step_per_context_token_s=context_s,
        prefill_s=base.prefill_s,
        prefill_per_token_s=base.prefill_per_token_s * factor,
    )
