"""KV blocks that move while their requests are open: no token changes, and the books stay right.

The program moves live blocks of real vLLM about at random steps, aborts requests while their KV is
on the host or their cache shrunk, and at every switch compares the block pool, the tables of the
worker, what is mapped and what the host store holds.
"""

import pytest
from e2e_support import job_for, requests_for

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen3")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("engine", "room"),
    # Beside the model that runs there is room for all that others have live, or for nothing.
    [({}, 8 * MIB), ({"enable_prefix_caching": False}, 0)],
    ids=["kept", "forced-out-no-prefix-cache"],
)
def test_blocks_that_move_and_requests_that_end_on_the_way_change_no_token(
    engine, room, tiny_models, program, plain_vllm
):
    models = tiny_models(*NAMES)
    requests = requests_for(list(models))
    victims = {
        name: [
            {"prompt": f"{name} {i} " * 40, "sampling": {"max_tokens": 60, "ignore_eos": True}}
            for i in range(3)
        ]
        for name in NAMES
    }
    job = job_for(models, requests, vllm=engine, victims=victims, seed=room + len(engine))
    job["device_memory"] += room
    answer = program("books", job)
    assert answer["tokens"] == plain_vllm(models, requests, engine)
    assert answer["aborted"] == 6
    assert answer["moved"] > 50
    assert answer["checked"] > 40
    if room:
        # Live blocks stay on the device, in front: they moved there, and nothing went to the host.
        assert answer["compacted"] > 50
        assert answer["kept"] > 20
    else:
        assert answer["bytes_out"] > 0
