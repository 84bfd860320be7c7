"""A long row of switches leaves the process as it was."""

import pytest
from e2e_support import job_for, requests_for

pytestmark = pytest.mark.vllm

WARM_UP, SWITCHES = 100, 1100
RSS_BYTES_PER_SWITCH = 1024
# A leaked range or handle has at least 2 MiB; what the C library's heap grows by is far below.
ADDRESS_SPACE_BYTES_PER_SWITCH = 16 << 10


def test_a_thousand_switches_leave_nothing_behind(tiny_models, program):
    models = tiny_models("llama", "qwen3", "gemma")
    requests = requests_for(list(models), per_model=4, max_tokens=60)
    job = job_for(models, requests, warm_up=WARM_UP, switches=SWITCHES)
    before, after = program("leaks", job)["seen"]
    grown = after.pop("rss") - before.pop("rss")
    grown_space = after.pop("address_space") - before.pop("address_space")
    assert after == before
    assert grown / (SWITCHES - WARM_UP) < RSS_BYTES_PER_SWITCH
    assert grown_space / (SWITCHES - WARM_UP) < ADDRESS_SPACE_BYTES_PER_SWITCH
