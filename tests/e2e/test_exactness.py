"""Tokens of models that share too little memory, against the same models served alone.

Every test runs real vLLM twice: ours with a switch after every token, and plain vLLM with each
model alone in a process that knows nothing of us.
"""

import json
import shutil

import pytest
from e2e_support import job_for, requests_for

pytestmark = pytest.mark.vllm

# Seven blocks beside the null block: not enough for six requests of two or three blocks.
SMALL_KV = 2 << 20
FEW_BLOCKS = {"enable_prefix_caching": False, "max_num_batched_tokens": 512}
ARCHITECTURES = ("llama", "qwen3", "gemma", "qwen3_moe", "gemma3")


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_a_switch_after_every_token_changes_no_token(
    prefix_caching, tiny_models, program, plain_vllm
):
    models = tiny_models(*ARCHITECTURES)
    requests = requests_for(list(models))
    engine = {"enable_prefix_caching": prefix_caching}
    answer = program("exact", job_for(models, requests, vllm=engine, rounds=2))
    expected = plain_vllm(models, requests, engine)
    assert answer["rounds"] == [expected, expected]
    # It really switched, with copies both ways, at every turn.
    assert answer["warm"] > 0.9 * answer["steps"]
    assert answer["hot"] == 0
    assert answer["bytes_out"] > 0
    assert (answer["cached"][1] > 0) is prefix_caching


def test_switches_by_slack_change_no_token(tiny_models, program, plain_vllm):
    models = tiny_models("llama", "qwen3")
    requests = requests_for(list(models))
    answer = program("exact", job_for(models, requests, policy="slack"))
    assert answer["rounds"] == [plain_vllm(models, requests)]
    assert answer["warm"] >= 2


def test_unseeded_sampling_draws_what_the_model_alone_would_draw(tiny_models, program, plain_vllm):
    """It draws from the process's generators, which are exchanged with the model."""
    models = tiny_models("llama", "qwen3")
    requests = requests_for(list(models), per_model=3)
    for wanted in requests.values():
        for request in wanted:
            request["sampling"].update(temperature=0.9, seed=None)
    answer = program("exact", job_for(models, requests))
    assert answer["rounds"] == [plain_vllm(models, requests)]
    assert answer["warm"] > 0.9 * answer["steps"]


def test_nan_left_in_memory_by_another_model_changes_no_token(
    tiny_models, program, plain_vllm, tmp_path, monkeypatch
):
    """Poison is NaN in bf16. In a model whose layers all have a sliding window, vLLM's CPU
    runner zeroes no new block itself, even when it is told which ones are new.
    """
    models = tiny_models("llama", "mistral")
    windowed = tmp_path / "windowed"
    shutil.copytree(models["mistral"], windowed)
    config = json.loads((windowed / "config.json").read_text())
    (windowed / "config.json").write_text(json.dumps({**config, "sliding_window": 64}))
    models["mistral"] = str(windowed)
    requests = requests_for(list(models), per_model=3)
    monkeypatch.setenv("AEGAEON_POISON_MEMORY", "1")
    answer = program("exact", job_for(models, requests))
    assert answer["rounds"] == [plain_vllm(models, requests)]


def test_requests_that_are_preempted_for_want_of_blocks_come_out_the_same(
    tiny_models, program, plain_vllm
):
    models = tiny_models("llama", "qwen3")
    requests = requests_for(list(models), per_model=6, max_tokens=150)
    answer = program("exact", job_for(models, requests, kv_memory=SMALL_KV, vllm=FEW_BLOCKS))
    expected = plain_vllm(models, requests, FEW_BLOCKS, kv_memory=SMALL_KV)
    assert answer["rounds"] == [expected]
    assert all(count > 0 for count in answer["preemptions"].values())


def test_models_that_fit_together_are_switched_without_a_copy(tiny_models, program, plain_vllm):
    models = tiny_models("llama", "qwen3")
    requests = requests_for(list(models))
    job = job_for(models, requests)
    job["device_memory"] *= 2
    answer = program("exact", job)
    assert answer["rounds"] == [plain_vllm(models, requests)]
    assert answer["hot"] > 0.9 * answer["steps"]
    # Two loads of weights, two of fresh KV; nothing moved afterwards.
    assert answer["warm"] <= 4
    assert answer["bytes_out"] == 0


@pytest.mark.parametrize("corrupt", ["weights", "kv"])
def test_one_flipped_byte_in_a_host_image_is_noticed(corrupt, tiny_models, program, plain_vllm):
    models = tiny_models("llama", "qwen3")
    requests = requests_for(list(models))
    answer = program("exact", job_for(models, requests, corrupt=corrupt))
    for name, expected in plain_vllm(models, requests).items():
        assert answer["rounds"][0][name] != expected
