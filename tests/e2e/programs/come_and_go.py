"""The last model of the job comes while the others generate, generates beside them, and goes; then
it comes and goes `times` more. Reports all tokens, and what the process holds after each time.
"""

import gc
import threading
import weakref
from typing import Any

import psutil
from common import make_pool, model_config, read_job, report, token_ids_by_model

from aegaeon.core.errors import OrderRefused
from aegaeon.vllm_plugin.offline import OfflinePool, Prompt


def holdings(pool: OfflinePool) -> dict[str, int]:
    gc.collect()
    stats = pool.switcher.arena.stats()
    process = psutil.Process()
    return {
        "rss": process.memory_info().rss,
        "fds": process.num_fds(),
        "threads": threading.active_count(),
        "owned": sum(stats.owners.values()),
        "free": stats.free_bytes,
        "quarantined": stats.quarantined_bytes,
        "kv_store": pool.switcher.kv_store.stats().used_bytes,
    }


def prompts_for(job: dict[str, Any], name: str) -> list[Prompt]:
    return [
        Prompt(model=name, prompt=each["prompt"], sampling=each["sampling"])
        for each in job["requests"][name]
    ]


def main() -> None:
    job = read_job()
    guest = list(job["models"])[-1]
    path = job["models"].pop(guest)
    with make_pool(job) as pool:
        stayed, ids = [], []
        for name in job["models"]:
            for prompt in prompts_for(job, name):
                stayed.append(prompt)
                ids.append(pool.submit(prompt))
        for _ in range(5):
            pool.loop.run_turn()
        seen, tokens, collected = [], [], []
        refused = ""
        for _ in range(1 + job["times"]):
            engine = pool.add_model(model_config(job, guest, path))
            model = weakref.ref(engine.core.model_executor.driver_worker.worker.model_runner.model)
            prompts = prompts_for(job, guest)
            guest_ids = [pool.submit(prompt) for prompt in prompts]
            pool.loop.run_turn()
            try:
                pool.remove_model(guest)
            except OrderRefused as error:
                refused = str(error)
            pool.loop.run_until_idle()
            outputs = [engine.finished.pop(request_id) for request_id in guest_ids]
            tokens.append(token_ids_by_model(prompts, outputs)[guest])
            del engine
            pool.remove_model(guest)
            seen.append(holdings(pool))
            collected.append(model() is None)
        outputs = [
            pool.engines[prompt.model].finished.pop(request_id)
            for prompt, request_id in zip(stayed, ids, strict=True)
        ]
        report(
            {
                "stayed": token_ids_by_model(stayed, outputs),
                "guest": tokens,
                "seen": seen,
                "collected": collected,
                "refused": refused,
                "models": list(pool.switcher.models),
            }
        )


if __name__ == "__main__":
    main()
