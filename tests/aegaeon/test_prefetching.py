"""Weights that are brought in while another model runs."""

import time

import pytest
from switcher_support import (
    KV,
    LAUNCH_FAILED,
    WEIGHTS,
    activate_as_the_loop_does,
    assert_every_live_block_is_somewhere,
    assert_ledger_holds,
    make_switcher,
)

from aegaeon.switching.residency import ModelState
from aegaeon_kernels.testing import FaultyDevice


def test_what_is_prefetched_is_not_loaded_again():
    switcher, (_, b, _) = make_switcher(capacity=2 * WEIGHTS + KV)
    switcher.activate("a")
    assert switcher.prefetch("b")
    assert switcher.models["b"].state is ModelState.LOADING
    assert not switcher.is_resident("b")
    while b.weights.bytes_ahead < WEIGHTS:
        time.sleep(0.001)
    assert switcher.prefetch("b")  # nothing more to do
    switcher.activate("b")
    assert switcher.prefetcher.stats().load.bytes == 2 * WEIGHTS  # those of a, and once those of b
    b.assert_intact()
    record = switcher.records[-1]
    assert (record.path, record.bytes_in, record.bytes_ahead) == ("warm", WEIGHTS, WEIGHTS)
    assert (switcher.totals.prefetches, switcher.totals.bytes_ahead) == (1, WEIGHTS)
    switcher.close()


def test_a_prefetch_takes_the_weights_of_others_but_not_of_the_current_model():
    switcher, models = make_switcher(capacity=2 * WEIGHTS + 3 * KV)
    switcher.activate("a")
    switcher.activate("b")
    assert switcher.prefetch("c")
    assert [model.weights.mapped_bytes for model in models] == [0, WEIGHTS, WEIGHTS]
    assert_ledger_holds(switcher)
    switcher.activate("c")
    models[2].assert_intact()


@pytest.mark.parametrize("pinned", [False, True])
def test_without_room_nothing_is_prefetched(pinned):
    switcher, (a, _, c) = make_switcher(capacity=(2 if pinned else 1) * WEIGHTS + 2 * KV)
    switcher.models["c"].pinned = pinned
    if pinned:
        switcher.activate("c")
    switcher.activate("a")
    assert not switcher.prefetch("b")
    a.assert_intact()
    assert c.weights.resident is pinned


def test_a_prefetch_gives_way_to_another_model():
    switcher, (_, b, c) = make_switcher(capacity=2 * WEIGHTS + 2 * KV)
    switcher.activate("a")
    assert switcher.prefetch("b")
    assert switcher.prefetch("c")  # b has not run yet: its load is given up
    assert switcher.models["b"].state is ModelState.HOST
    assert (b.weights.mapped_bytes, c.weights.mapped_bytes) == (0, WEIGHTS)
    for model in (c, b):
        switcher.activate(model.name)
        model.assert_intact()
    assert_ledger_holds(switcher)


def test_removing_a_model_ends_its_prefetch():
    switcher, _ = make_switcher(capacity=2 * WEIGHTS + 2 * KV)
    switcher.activate("a")
    assert switcher.prefetch("b")
    switcher.remove_model("b")
    assert switcher.arena.stats().owned_bytes == WEIGHTS + KV


@pytest.mark.parametrize("persistent", [False, True])
def test_when_any_one_driver_call_of_a_prefetch_fails_the_switch_still_works(persistent):
    n = 0
    fired = True
    while fired:
        n += 1
        switcher, (a, b, c) = make_switcher(capacity=2 * WEIGHTS + 2 * KV, faulty=True)
        device = switcher.arena.device
        assert isinstance(device, FaultyDevice)
        switcher.activate("c")
        switcher.activate("a")
        a.write(5, 54)
        device.reset()
        device.fail_call(n, code=LAUNCH_FAILED, persistent=persistent)
        switcher.prefetch("b")
        while b.weights.loading_ahead and b.weights.bytes_ahead < WEIGHTS:
            time.sleep(0.001)
        fired = device.num_calls >= n
        assert_ledger_holds(switcher)
        assert switcher.current == "a"
        a.assert_intact()
        device.reset()
        for model in (b, a, c):
            activate_as_the_loop_does(switcher, model.name, tries=5)
            model.assert_intact()
        assert_every_live_block_is_somewhere([a, b, c])
        switcher.close()
    assert n > 5
