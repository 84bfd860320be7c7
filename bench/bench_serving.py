"""What does hosting cost a model that is served alone: `aegaeon serve` against stock vLLM's server?

    pytest bench/bench_serving.py         (with --keep-results the figures go to results/)

Limit: stock vLLM with the same model, weight format, eager mode, KV cache and compute threads: it
runs the same kernels and has nothing to switch. In the arena weights stay plain tensors, so vLLM's
packing for oneDNN is off in both (peers/plain_weights); the server with packed weights, which is
what vLLM does by default, stands beside it. All servers run at once and idle in turn; rounds are
interleaved, each ratio is of one round. Goal: at least 97 % of stock vLLM's tokens per second.
Two processes of the same kind differ by up to 8 % for as long as they live, so the servers start
in random order, stock vLLM runs twice, ratios are to the mean of both, and how far these two are
from it is the error of one run. Take the median of several runs.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from random import Random

import pytest
from load import Load, prompts, run_load
from measure import paired_ratio, quantiles
from servers import Server, aegaeon_server, vllm_server

from aegaeon.tiny_model import write_tiny_model

# On a busy machine starting four servers takes minutes.
pytestmark = pytest.mark.timeout(900)

MAX_TOKENS = 64
NAME, IDLE = "llama", "qwen3"
OURS = ("aegaeon, one model", "aegaeon, a second one idle")
SAME = ("vllm, plain weights", "vllm, plain weights, again")
PACKED = "vllm, packed weights"
# Requests of one round and rounds, by how many are open at once.
ROUNDS = {1: (2, 6), 8: (8, 6)}


@pytest.fixture(scope="module")
def servers(size, tmp_path_factory) -> Iterator[dict[str, Server]]:
    """By name; all serve the same checkpoint."""
    folder = tmp_path_factory.mktemp(size)
    models = {
        arch: write_tiny_model(arch, folder / arch, size=size, seed=seed)
        for seed, arch in enumerate((NAME, IDLE))
    }
    alone = {NAME: models[NAME]}

    def stock(name: str, *, plain_weights: bool) -> AbstractContextManager[Server]:
        return vllm_server(NAME, models[NAME], folder / name, plain_weights=plain_weights)

    starts: list[tuple[str, Callable[[], AbstractContextManager[Server]]]] = [
        (OURS[0], lambda: aegaeon_server(alone, folder / "one")),
        (OURS[1], lambda: aegaeon_server(models, folder / "two")),
        (SAME[0], lambda: stock("same", plain_weights=True)),
        (SAME[1], lambda: stock("again", plain_weights=True)),
        (PACKED, lambda: stock("packed", plain_weights=False)),
    ]
    Random().shuffle(starts)
    with ExitStack() as stack:
        yield {name: stack.enter_context(start()) for name, start in starts}


@pytest.mark.parametrize("size", ["small"], scope="module")
@pytest.mark.parametrize("concurrency", [1, 8])
def test_single_model(size, concurrency, servers, record):
    count, rounds = ROUNDS[concurrency]

    def load(name: str, seed: int, count: int = count, concurrency: int = concurrency) -> Load:
        texts = prompts(count, seed=seed)
        address = servers[name].address
        return run_load(address, NAME, texts, concurrency=concurrency, max_tokens=MAX_TOKENS)

    # One at a time: with other batches the last bits of logits differ between any two servers.
    answers = {name: load(name, seed=0, count=2, concurrency=1).answers for name in servers}
    expected = [answer.token_ids for answer in answers[SAME[0]]]
    for name in (*OURS, SAME[1]):
        assert [answer.token_ids for answer in answers[name]] == expected

    loads: dict[str, list[Load]] = {name: [] for name in servers}
    cpu_seconds = dict.fromkeys(servers, 0.0)
    order = list(servers)
    random = Random(0)
    for index in range(rounds + 1):
        for name in order:
            before = servers[name].cpu_seconds()
            done = load(name, seed=index)
            if index > 0:  # the first round warms up
                cpu_seconds[name] += servers[name].cpu_seconds() - before
                loads[name].append(done)
        random.shuffle(order)

    rates = {name: [load.tokens_per_s for load in done] for name, done in loads.items()}
    same = [statistics.mean(pair) for pair in zip(*(rates[name] for name in SAME), strict=True)]
    for name, done in loads.items():
        ttft = [answer.ttft_s for load in done for answer in load.answers]
        figures = {
            "tokens_per_s": statistics.median(rates[name]),
            "of_same_format": paired_ratio(rates[name], same),
            "of_packed": paired_ratio(rates[name], rates[PACKED]),
            **quantiles("ttft_ms", ttft),
            "cpu_ms_per_token": cpu_seconds[name] / (rounds * count * MAX_TOKENS) * 1e3,
            "rounds": rounds,
            "started_as": 1 + list(servers).index(name),
        }
        record(f"{size} model, {concurrency} open, {name}", None, **figures)
