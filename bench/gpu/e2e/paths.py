"""How long until the first token of a model that is not running, by where it is?

Limit: the link, for what is on the host; 15 GiB at 50 GB/s are 0.32 s. `vLLM started anew` is what
people do today, `vLLM sleep` what vLLM offers on a GPU (level 1 keeps weights on the host, 2 does
not).
"""

import time
from collections.abc import Iterator
from tempfile import TemporaryDirectory

from load import prompts
from measure import quantiles
from scale import Result, Scale, run_program

from aegaeon.vllm_plugin.plain import run_alone


def measure_paths(scale: Scale) -> Iterator[Result]:
    running, wanted = list(scale.models)[:2]
    with TemporaryDirectory(dir=scale.folder) as images:
        answer = run_program(
            "switch_paths",
            {
                "device": scale.device,
                "models": {name: str(scale.models[name]) for name in (running, wanted)},
                "device_memory": scale.room_for(running, wanted),
                "kv_memory": scale.kv_memory,
                "max_model_len": scale.max_model_len,
                "prompt": prompts(1)[0],
                "rounds": scale.rounds,
                "load_rounds": scale.load_rounds,
                "image_cache": images,
            },
        )
    if not answer["exact"]:
        raise AssertionError("the paths lead to different tokens")
    for path, rounds in answer["seconds"].items():
        yield {
            "result": f"first token: {path}",
            "model": wanted,
            **quantiles("first_token_ms", [total for total, _ in rounds]),
            **quantiles("of_which_switch_or_load_ms", [part for _, part in rounds]),
        }
    job = {
        "model": str(scale.models[wanted]),
        "max_model_len": scale.max_model_len,
        "kv_memory": scale.kv_memory,
        "engine": scale.engine,
        "requests": [{"prompt": prompts(1)[0], "sampling": {"max_tokens": 1, "temperature": 0.0}}],
    }
    started = time.monotonic()
    run_alone([job])
    seconds = time.monotonic() - started
    yield {"result": "first token: vLLM started anew", "model": wanted, "first_token_s": seconds}
    yield from _sleep(scale, wanted)


def _sleep(scale: Scale, wanted: str) -> Iterator[Result]:
    if not scale.is_gpu:
        yield {"result": "first token: vLLM sleep", "skipped": "vLLM cannot sleep on a CPU"}
        return
    for level in (1, 2):
        answer = run_program(
            "vllm_sleep",
            {
                "model": str(scale.models[wanted]),
                "level": level,
                "rounds": max(3, scale.rounds // 10),
                "max_model_len": scale.max_model_len,
                "kv_memory": scale.kv_memory,
                "engine": scale.engine,
                "prompt": prompts(1)[0],
            },
        )
        yield {
            "result": f"first token: vLLM sleep level {level}",
            "model": wanted,
            "exact": answer["exact"],
            **quantiles("sleep_ms", answer["sleep_s"]),
            **quantiles("first_token_ms", answer["wake_s"]),
        }
