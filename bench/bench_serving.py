"""What does hosting cost a model that is served alone: `aegaeon serve` against stock vLLM's server?

    pytest bench/bench_serving.py         (with --keep-results the figures go to results/)

Limit: stock vLLM with the same model, weight format, eager mode, KV cache and compute threads: it
runs the same kernels and has nothing to switch. In the arena weights stay plain tensors, so vLLM's
packing for oneDNN is off in both (peers/plain_weights); the server with packed weights, which is
what vLLM does by default, stands beside it. All servers run at once and idle in turn; rounds are
interleaved, each ratio is of one round. Goal: at least 97 % of stock vLLM's tokens per second.
"""

import statistics
from contextlib import ExitStack

import pytest
from load import Load, prompts, run_load
from measure import paired_ratio, quantiles
from servers import aegaeon_server, vllm_server

from aegaeon.tiny_model import write_tiny_model

# On a busy machine starting four servers takes minutes.
pytestmark = pytest.mark.timeout(900)

MAX_TOKENS = 64
NAME, IDLE = "llama", "qwen3"
OURS = ("aegaeon, one model", "aegaeon, a second one idle")
SAME, PACKED = "vllm, plain weights", "vllm, packed weights"
# Requests of one round and rounds, by how many are open at once.
ROUNDS = {1: (3, 6), 8: (16, 6)}


@pytest.fixture(scope="module")
def servers(size, tmp_path_factory):
    """By name; all serve the same checkpoint."""
    folder = tmp_path_factory.mktemp(size)
    models = {
        arch: write_tiny_model(arch, folder / arch, size=size, seed=seed)
        for seed, arch in enumerate((NAME, IDLE))
    }
    alone = {NAME: models[NAME]}
    with ExitStack() as stack:
        one = stack.enter_context(aegaeon_server(alone, folder / "one"))
        two = stack.enter_context(aegaeon_server(models, folder / "two"))
        same = stack.enter_context(
            vllm_server(NAME, models[NAME], folder / "same", plain_weights=True)
        )
        packed = stack.enter_context(
            vllm_server(NAME, models[NAME], folder / "packed", plain_weights=False)
        )
        yield dict(zip((*OURS, SAME, PACKED), (one, two, same, packed), strict=True))


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
    expected = [answer.token_ids for answer in answers[SAME]]
    for name in OURS:
        assert [answer.token_ids for answer in answers[name]] == expected

    loads: dict[str, list[Load]] = {name: [] for name in servers}
    cpu_seconds = dict.fromkeys(servers, 0.0)
    order = list(servers)
    for index in range(rounds + 1):
        for name in order:
            before = servers[name].cpu_seconds()
            done = load(name, seed=index)
            if index > 0:  # the first round warms up
                cpu_seconds[name] += servers[name].cpu_seconds() - before
                loads[name].append(done)
        order.append(order.pop(0))

    rates = {name: [load.tokens_per_s for load in done] for name, done in loads.items()}
    for name, done in loads.items():
        ttft = [answer.ttft_s for load in done for answer in load.answers]
        figures = {
            "tokens_per_s": statistics.median(rates[name]),
            "of_same_format": paired_ratio(rates[name], rates[SAME]),
            "of_packed": paired_ratio(rates[name], rates[PACKED]),
            **quantiles("ttft_ms", ttft),
            "cpu_ms_per_token": cpu_seconds[name] / (rounds * count * MAX_TOKENS) * 1e3,
            "rounds": rounds,
        }
        record(f"{size} model, {concurrency} open, {name}", None, **figures)
