"""The only request of the first model is aborted while the second one has the device; the step that
only reports that runs while the first model is away. Then the first one generates again.
"""

from common import make_pool, read_job, report

from aegaeon.vllm_plugin.offline import Prompt


def main() -> None:
    job = read_job()
    first, second = job["models"]
    sampling = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    with make_pool(job) as pool:
        prompt = Prompt(first, "Once upon a time", sampling)
        (before,) = pool.generate([prompt])
        aborted = pool.submit(prompt)
        pool.loop.run_turn()
        pool.switcher.activate(second)
        pool.switcher.evict(first)
        engine = pool.engines[first].engine
        engine.abort_request([aborted])
        mapped = sum(unit.mapped_bytes for unit in pool.switcher.models[first].units)
        pool.engines[first].core.step()
        (after,) = pool.generate([prompt])
        report(
            {
                "mapped": mapped,
                "before": list(before.outputs[0].token_ids),
                "after": list(after.outputs[0].token_ids),
            }
        )


if __name__ == "__main__":
    main()
