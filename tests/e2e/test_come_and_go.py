"""A model may come while others generate, and go again without a trace."""

import pytest
from e2e_support import job_for, requests_for

pytestmark = pytest.mark.vllm

RSS_BYTES_PER_TIME = 2 << 20


def test_a_model_comes_and_goes_while_others_generate(tiny_models, plain_vllm, program):
    models = tiny_models("llama", "qwen3", "gemma")
    requests = requests_for(list(models), per_model=3)
    expected = plain_vllm(models, requests)
    answer = program("come_and_go", job_for(models, requests, times=5))

    guest = list(models)[-1]
    assert all(tokens == expected[guest] for tokens in answer["guest"])
    assert answer["stayed"] == {name: expected[name] for name in models if name != guest}
    assert answer["models"] == list(answer["stayed"])
    assert "open requests" in answer["refused"]

    assert all(answer["collected"]), "the model's tensors are still there"
    grown = [seen.pop("rss") for seen in answer["seen"]]
    assert all(seen == answer["seen"][1] for seen in answer["seen"][2:])
    assert (grown[-1] - grown[1]) / (len(grown) - 2) < RSS_BYTES_PER_TIME
