"""Offline generation with several models in this process: what `aegaeon generate` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aegaeon_kernels as ak
from aegaeon.checkpoint import weight_bytes
from aegaeon.core import envs
from aegaeon.core.config import ModelConfig
from aegaeon.core.errors import ConfigError
from aegaeon.sched.policies.round_robin import RoundRobin

# Room beside weights and KV for rounding up to whole handles.
_ROUNDING_BYTES = 16 << 20


@dataclass(frozen=True)
class Answer:
    """What one model answered to one prompt."""

    model: str
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


def generate_offline(
    models: Sequence[ModelConfig],
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    device_memory_bytes: int | None,
    quantum: int,
) -> list[Answer]:
    """Every model answers every prompt; the models take turns on one device.

    device_memory_bytes: what they share; None: enough for the largest of them, so that they must
    be switched.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"two models have one name: {', '.join(names)}; rename a directory")
    needs = [weight_bytes(model.name, Path(model.model)) + model.kv_memory for model in models]
    if device_memory_bytes is None:
        device_memory_bytes = max(needs) + _ROUNDING_BYTES

    envs.set_vllm_defaults()
    from aegaeon.vllm_plugin.offline import OfflinePool, Prompt

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    device = ak.Device("host", memory_bytes=device_memory_bytes)
    with OfflinePool(
        device, device_memory_bytes=device_memory_bytes, policy=RoundRobin(quantum)
    ) as pool:
        for model in models:
            pool.add_model(model)
        requests = [
            Prompt(model=model.name, prompt=prompt, sampling=sampling)
            for prompt in prompts
            for model in models
        ]
        outputs = pool.generate(requests)
    return [
        Answer(
            model=request.model,
            prompt=str(request.prompt),
            text=output.outputs[0].text,
            token_ids=tuple(output.outputs[0].token_ids),
            finish_reason=output.outputs[0].finish_reason,
        )
        for request, output in zip(requests, outputs, strict=True)
    ]
