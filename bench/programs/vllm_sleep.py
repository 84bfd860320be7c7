"""Plain vLLM puts a model to sleep and wakes it; needs a GPU.

Reads a job from standard input: `model`, `level`, `rounds`, `max_model_len`, `kv_memory`, `engine`,
`prompt`. The last line of standard output is the answer: seconds of each sleep, and of each wake up
to the next token; `exact`: the token is the same every time. Level 2 reloads the weights.
"""

import json
import sys
import time

from aegaeon.core import envs

envs.set_vllm_defaults()


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(
        model=job["model"],
        max_model_len=job["max_model_len"],
        kv_cache_memory_bytes=job["kv_memory"],
        enable_sleep_mode=True,
        disable_log_stats=True,
        **job["engine"],
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1)

    def token() -> int:
        [output] = llm.generate([job["prompt"]], sampling, use_tqdm=False)
        return int(output.outputs[0].token_ids[0])

    first = token()
    exact = True
    sleep_s, wake_s = [], []
    for _ in range(job["rounds"]):
        started = time.perf_counter()
        llm.sleep(level=job["level"])
        sleep_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        if job["level"] == 2:
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
        else:
            llm.wake_up()
        exact &= token() == first
        wake_s.append(time.perf_counter() - started)
    sys.stdout.flush()
    print(json.dumps({"sleep_s": sleep_s, "wake_s": wake_s, "exact": exact}), flush=True)


if __name__ == "__main__":
    main()
