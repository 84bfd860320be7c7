"""What every model of a soak is asked, and when, counted in its own steps.

An arrival or an abort belongs to a step of its model, not to a second: then the model has the same
batches whether it is alone or one of many, and every bit of its answers is comparable, also where
the numbers of a row depend on how many are computed with it.
"""

import random
from typing import Any

WORDS = (
    "harbour",
    "ship",
    "island",
    "rain",
    "river",
    "coffee",
    "morning",
    "winter",
    "three",
    "blue",
)


def script(name: str, *, seed: int, num_requests: int) -> list[dict[str, Any]]:
    """Requests in order of arrival: `at` a step; `abort_at` a later one, or None."""
    rng = random.Random(f"{seed} {name}")
    beginnings = [" ".join(rng.choices(WORDS, k=length)) for length in (60, 130)]
    at = 0
    requests = []
    for index in range(num_requests):
        at += rng.choice((0, 0, 1, 2, 5, 17))
        max_tokens = rng.choice((1, 4, 16, 40, 70))
        prompt = " ".join(rng.choices(WORDS, k=rng.choice((1, 5, 30, 150))))
        if rng.random() < 0.4:
            prompt = f"{rng.choice(beginnings)} {prompt}"
        requests.append(
            {
                "id": f"{name}-{index}",
                "at": at,
                "abort_at": at + rng.randint(1, max_tokens) if rng.random() < 0.25 else None,
                "prompt": prompt,
                "sampling": {"max_tokens": max_tokens, "ignore_eos": True, **_sampling(rng)},
            }
        )
    return requests


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Greedy, seeded or unseeded, with whatever else shapes the distribution."""
    fields: dict[str, Any] = {"temperature": 0.0}
    kind = rng.choice(("greedy", "seeded", "seeded", "unseeded"))
    if kind != "greedy":
        fields = {"temperature": rng.uniform(0.3, 1.3), "top_p": rng.choice((1.0, 0.9))}
        fields["top_k"] = rng.choice((0, 5, 50))
    if kind == "seeded":
        fields["seed"] = rng.randrange(1 << 31)
    if rng.random() < 0.2:
        fields["repetition_penalty"] = 1.3
    if rng.random() < 0.2:
        fields["presence_penalty"] = 0.7
    if rng.random() < 0.3:
        fields["logprobs"] = rng.randint(0, 3)
    return fields
