"""Plain vLLM with one model, alone in its process: the reference that ours is compared with.

`python -m aegaeon.vllm_plugin.plain`, with a job as JSON on standard input and the answer as the
last line of standard output. Nothing of ours is applied: no seam, no worker, no switch.
"""

import json
import sys
import time
from typing import Any


def generate_alone(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job: `model`, `max_model_len`, `kv_memory` (bytes), `engine` (more options of vLLM),
    `requests`: each with `messages` or `prompt`, and `sampling` (fields of SamplingParams).

    Returns `token_ids` per request, in order, and `seconds` from the start of the engine to the
    first and to the last answer.
    """
    from vllm import LLM

    started = time.monotonic()
    llm = LLM(
        model=job["model"],
        max_model_len=job["max_model_len"],
        kv_cache_memory_bytes=job["kv_memory"],
        enforce_eager=True,
        disable_log_stats=True,
        **job.get("engine", {}),
    )
    engine_s = time.monotonic() - started
    requests = job["requests"]
    sampling = []
    for request in requests:
        params = llm.get_default_sampling_params()
        for name, value in request["sampling"].items():
            setattr(params, name, value)
        sampling.append(params)
    if "messages" in requests[0]:
        outputs = llm.chat([request["messages"] for request in requests], sampling, use_tqdm=False)
    else:
        outputs = llm.generate(
            [request["prompt"] for request in requests], sampling, use_tqdm=False
        )
    return {
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        "engine_s": engine_s,
        "total_s": time.monotonic() - started,
    }


if __name__ == "__main__":
    answer = generate_alone(json.load(sys.stdin))
    sys.stdout.flush()
    print(json.dumps(answer), flush=True)
