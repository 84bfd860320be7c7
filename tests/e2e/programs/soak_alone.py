"""Plain vLLM with one model at a time, to which a script is played; reports the answers.

Nothing of ours is applied but what concerns the numbers of a CPU (`apply_numbers`).
"""

import json
import sys
from typing import Any

from play import Player

from aegaeon.core import envs

envs.set_vllm_defaults()


def play_alone(job: dict[str, Any], name: str) -> dict[str, Any]:
    from vllm import LLM

    engine = LLM(
        model=job["models"][name],
        max_model_len=job["max_model_len"],
        kv_cache_memory_bytes=job["kv_memory"],
        enforce_eager=True,
        disable_log_stats=True,
        **job["vllm"],
    ).llm_engine
    player = Player(engine, job["scripts"][name])
    while not player.done:
        player.due()
        player.took(engine.step())
    engine.engine_core.shutdown()
    return player.answers()


if __name__ == "__main__":
    job = json.load(sys.stdin)
    from aegaeon.vllm_plugin import seams

    seams.apply_numbers()
    answers = {name: play_alone(job, name) for name in job["models"]}
    sys.stdout.flush()
    print(json.dumps({"answers": answers}), flush=True)
