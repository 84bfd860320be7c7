"""Is every token of models that are switched after every step that of the model alone?

With CUDA graphs as vLLM captures them. The device holds the largest model and nothing beside it, so
that every switch moves everything. Alone is plain vLLM, each model in the same process after the
other, with the same requests; on a CPU it keeps weights unpacked, as a hosted model does.
"""

from collections.abc import Iterator
from typing import Any

from load import prompts
from scale import Result, Scale, run_program

from aegaeon.vllm_plugin.plain import run_alone


def measure_exactness(scale: Scale) -> Iterator[Result]:
    steps = -(-scale.switches // len(scale.models))  # each is a switch: all requests run together
    sampling = {"max_tokens": steps, "temperature": 0.0, "ignore_eos": True}
    requests: list[dict[str, Any]] = [
        {"prompt": text, "sampling": {**sampling, **seeded}}
        for text, seeded in zip(prompts(4), ({}, {"temperature": 0.9, "seed": 7}) * 2, strict=True)
    ]
    together = run_program(
        "pool_tokens",
        {
            "device": scale.device,
            "device_memory": scale.room_for_largest,
            "models": {name: str(path) for name, path in scale.models.items()},
            "kv_memory": scale.kv_memory,
            "max_model_len": scale.max_model_len,
            "vllm": scale.engine,
            "requests": requests,
        },
    )
    jobs = [
        {
            "model": str(path),
            "max_model_len": scale.max_model_len,
            "kv_memory": scale.kv_memory,
            "engine": {**scale.engine},
            "requests": requests,
        }
        for path in scale.models.values()
    ]
    alone = run_alone(jobs, same_numbers=not scale.is_gpu)
    different = {
        name: sum(
            a != b for a, b in zip(together["token_ids"][name], answer["token_ids"], strict=True)
        )
        for name, answer in zip(scale.models, alone, strict=True)
    }
    yield {
        "result": "switch after every token",
        "exact": not any(different.values()),
        "requests_that_differ": different,
        "tokens": sum(len(ids) for of in together["token_ids"].values() for ids in of),
        "switches": together["switches"],
    }
    if any(different.values()):
        raise AssertionError(f"requests differ from the model alone: {different}")
