"""One model's step raises in the middle of generation; reports what became of the others.

`broken`: its name, `at`: before which of its forward passes the error is raised.
"""

from typing import Any

from common import make_pool, prompts_of, read_job, report


def main() -> None:
    job = read_job()
    with make_pool(job) as pool:
        worker = pool.engines[job["broken"]].core.model_executor.driver_worker.worker
        passes = 0

        def break_down(*_: Any) -> None:
            nonlocal passes
            passes += 1
            if passes == job["at"]:
                raise RuntimeError("the model broke down")

        worker.model_runner.get_model().register_forward_pre_hook(break_down)
        given_up: list[tuple[str, str]] = []
        pool.loop.on_failure = lambda name, error: given_up.append((name, str(error)))
        prompts = prompts_of(job)
        ids = [pool.submit(prompt) for prompt in prompts]
        pool.loop.run_until_idle()
        answers: dict[str, list[list[int]]] = {}
        for request_id, prompt in zip(ids, prompts, strict=True):
            output = pool.engines[prompt.model].finished.get(request_id)
            if output is not None:
                answers.setdefault(prompt.model, []).append(list(output.outputs[0].token_ids))
        stats = pool.switcher.arena.stats()
        report(
            {
                "answers": answers,
                "given_up": given_up,
                "held": sorted({owner for owner, _ in stats.owners}),
                "total": stats.owned_bytes + stats.free_bytes + stats.quarantined_bytes,
                "capacity": stats.capacity_bytes,
                "host_blocks": pool.switcher.models[job["broken"]].units[1].num_copies,
            }
        )


if __name__ == "__main__":
    main()
