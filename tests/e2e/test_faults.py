"""A driver call fails while real models are switched: no token changes, nothing is lost."""

import pytest
from e2e_support import job_for, requests_for

pytestmark = pytest.mark.vllm

# More driver calls than one switch there and back makes: the fault moves through all of them.
CALLS = 60


def test_a_failing_driver_call_changes_no_token(tiny_models, program, plain_vllm):
    models = tiny_models("llama", "qwen3")
    requests = requests_for(list(models), per_model=2, max_tokens=4)
    engine = {"enable_prefix_caching": False}
    answer = program("faults", job_for(models, requests, upto=CALLS, vllm=engine))
    assert answer["different"] == []
    assert answer["unbalanced"] == []
    assert answer["failed_switches"] == CALLS
    assert answer["failed_models"] == 0
    assert answer["expected"] == plain_vllm(models, requests, engine)


def test_a_load_that_fails_at_any_driver_call_leaves_the_pool_as_it_was(
    tiny_models, program, plain_vllm
):
    models = tiny_models("llama", "qwen3")
    requests = requests_for(list(models), per_model=2, max_tokens=4)
    engine = {"enable_prefix_caching": False}
    job = job_for(models, requests, vllm=engine, late="qwen3")
    answer = program("load_faults", job)
    assert answer["failures"] > 15
    assert answer["wrong"] == []
    # Two of each model, and at most those of one failed attempt.
    assert answer["reservations"] <= 6
    assert answer["answers"] == plain_vllm(models, requests, engine)


def test_a_model_whose_step_raises_ends_alone_and_the_others_stay_exact(
    tiny_models, program, plain_vllm
):
    models = tiny_models("llama", "qwen3")
    requests = requests_for(list(models), per_model=2, max_tokens=4)
    engine = {"enable_prefix_caching": False}
    answer = program("broken_step", job_for(models, requests, vllm=engine, broken="llama", at=3))
    assert answer["given_up"] == [["llama", "the model broke down"]]
    assert answer["answers"] == {"qwen3": plain_vllm(models, requests, engine)["qwen3"]}
    # Nothing of it is left on the device or in the host's KV store, and the books balance.
    assert "llama" not in answer["held"]
    assert answer["host_blocks"] == 0
    assert answer["total"] == answer["capacity"]
