"""Plain vLLM with one model at a time, in a process of its own: what ours is compared with.

`run_alone` starts `python -m aegaeon.vllm_plugin.plain`, which reads jobs from standard input and
prints its answers as the last line. Nothing of ours is applied there, no seam, worker or switch;
with the exception of `same_numbers`, when asked for.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from aegaeon.core import envs
from aegaeon.core.errors import AegaeonError


def run_alone(
    jobs: Sequence[Mapping[str, Any]],
    *,
    same_numbers: bool = False,
    timeout_s: float | None = None,
) -> list[dict[str, Any]]:
    """Run `jobs` one after another, each on an engine of its own that ends before the next.

    job: `model`, `max_model_len`, `kv_memory` (bytes), `engine` (more options of vLLM), `requests`:
    each with `messages` and `sampling`, or as `request_form` says. same_numbers: on a CPU, compute
    as a hosted model does: see `apply_numbers`.
    Returns per job `answers` (see `answer_of`) and `token_ids` per request, in order; `engine_s`
    and `total_s`, seconds from the start of the job to the ready engine and to the last answer.
    Raises AegaeonError with the end of its output when vLLM fails.
    """
    envs.set_vllm_defaults()
    environment = envs.child_environment(
        {"AEGAEON_ENABLE": None, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    )
    done = subprocess.run(
        [sys.executable, "-m", "aegaeon.vllm_plugin.plain", *(["same-numbers"] * same_numbers)],
        input=json.dumps(list(jobs)),
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise AegaeonError(f"plain vLLM failed:\n{done.stderr[-4000:]}")
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _generate(job: Mapping[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    from aegaeon.vllm_plugin.request_form import answer_of

    started = time.monotonic()
    llm = LLM(
        model=job["model"],
        max_model_len=job["max_model_len"],
        kv_cache_memory_bytes=job["kv_memory"],
        disable_log_stats=True,
        **{"enforce_eager": True, **job.get("engine", {})},
    )
    engine_s = time.monotonic() - started
    outputs = _outputs(llm, job["requests"])
    answer = {
        "answers": [answer_of(output) for output in outputs],
        "token_ids": [answer_of(output).get("token_ids") for output in outputs],
        "engine_s": engine_s,
        "total_s": time.monotonic() - started,
    }
    llm.llm_engine.engine_core.shutdown()
    return answer


def _outputs(llm: Any, requests: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    from aegaeon.vllm_plugin.request_form import adapter_of, params_of, prompt_of, sampling_fields

    prompts = [prompt_of(request) for request in requests if "prompt" in request]
    if requests[0].get("sampling") is None:
        params = [params_of(request) for request in requests]
        return llm.encode(prompts, params, use_tqdm=False, pooling_task="embed")
    sampling = []
    for request in requests:
        params = llm.get_default_sampling_params()
        for name, value in sampling_fields(request).items():
            setattr(params, name, value)
        sampling.append(params)
    adapters = [adapter_of(request) for request in requests]
    lora = adapters if any(adapters) else None
    if not prompts:
        conversations = [request["messages"] for request in requests]
        return llm.chat(conversations, sampling, use_tqdm=False, lora_request=lora)
    return llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)


if __name__ == "__main__":
    if sys.argv[1:] == ["same-numbers"]:
        from aegaeon.vllm_plugin.seams import apply_numbers

        apply_numbers()
    answers = [_generate(job) for job in json.load(sys.stdin)]
    sys.stdout.flush()
    print(json.dumps(answers), flush=True)
