"""A stray access to an evicted model is a fault at the access, not garbage later."""

import json
import signal

import pytest
from e2e_support import job_for, run_program

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("what", ["weights", "kv"])
def test_touching_an_evicted_region_faults(what, tiny_models):
    models = tiny_models("llama", "qwen3")
    done = run_program("touch_evicted", job_for(models, {}, what=what))
    assert done.returncode == -signal.SIGSEGV, done.stderr[-4000:]
    assert "touching" in json.loads(done.stdout.splitlines()[-1])


def test_the_report_of_an_aborted_request_touches_no_memory_of_a_model_that_is_away(
    tiny_models, program
):
    models = tiny_models("llama", "qwen3")
    answer = program("report_evicted", job_for(models, {}))
    assert answer["mapped"] == 0
    assert len(answer["before"]) == 20
    assert answer["after"] == answer["before"]
