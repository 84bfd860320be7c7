"""Models of all kinds answer their requests with a switch after every step; reports the answers.

With their log probabilities, or vectors, so that a difference in the last bit of a number shows.
"""

from common import make_pool, prompts_of, read_job, report

from aegaeon.vllm_plugin.request_form import answer_of


def main() -> None:
    job = read_job()
    with make_pool(job) as pool:
        prompts = prompts_of(job)
        answers: dict[str, list[dict[str, object]]] = {name: [] for name in job["models"]}
        for prompt, output in zip(prompts, pool.generate(prompts), strict=True):
            answers[prompt.model].append(answer_of(output))
        totals = pool.switcher.totals
        report({"answers": answers, "steps": pool.loop.counters.steps, "warm": totals.warm})


if __name__ == "__main__":
    main()
