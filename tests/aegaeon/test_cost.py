"""The cost models learn lines, and do not believe everything."""

import pytest

from aegaeon.sched.cost import PUBLISHED, CostModel


def test_the_published_profiles_are_the_defaults():
    costs = CostModel({"m": PUBLISHED["Llama-2-13B", "H800"]})
    assert costs.step_s("m", 8) == pytest.approx(12.8e-3 + 8 * 155e-6)
    assert costs.prefill_s("m", 512) == pytest.approx(6.8e-3 + 512 * 45e-6)
    assert costs.switch_s(26_000_000_000) == pytest.approx(0.65)
    assert costs.switch_s(0) == 0.0


def test_steps_are_learned_and_outweigh_the_default():
    costs = CostModel()
    for i in range(200):
        costs.observe_step("m", 1 + i % 8, 0.05 + 0.002 * (1 + i % 8))
    assert costs.step_s("m", 4) == pytest.approx(0.058, rel=0.01)
    assert costs.step_s("m", 16) == pytest.approx(0.082, rel=0.02)
    assert costs.step_s("other", 1) == CostModel().step_s("other", 1)


def test_a_hiccup_is_no_trend():
    costs = CostModel()
    for _ in range(100):
        costs.observe_step("m", 2, 0.01)
    costs.observe_step("m", 2, 100.0)
    assert costs.step_s("m", 2) < 0.0125


def test_switches_are_learned_from_bytes_and_a_hot_one_teaches_nothing():
    costs = CostModel()
    for i in range(200):
        size = (1 + i % 4) * 1_000_000_000
        costs.observe_switch(size, 0.01 + size / 20e9)
        costs.observe_switch(0, 5.0)
    assert costs.switch_s(2_000_000_000) == pytest.approx(0.11, rel=0.02)
    assert costs.link_bytes_per_s == pytest.approx(20e9, rel=0.02)


def test_prefills_are_learned_from_their_tokens():
    costs = CostModel()
    for i in range(200):
        tokens = 100 * (1 + i % 8)
        costs.observe_prefill("m", tokens, 0.03 + tokens * 1e-4)
    assert costs.prefill_s("m", 1000) == pytest.approx(0.13, rel=0.02)
    assert costs.prefill_s("other", 1000) == CostModel().prefill_s("other", 1000)


def test_what_was_learned_of_a_model_goes_with_it():
    costs = CostModel()
    for _ in range(50):
        costs.observe_step("a", 1, 9.0)
        costs.observe_prefill("a", 100, 9.0)
    costs.forget("a")
    costs.observe_step("a", 1, 0.01)
    assert costs.step_s("a", 1) < 1.0
    assert costs.prefill_s("a", 100) == CostModel().prefill_s("a", 100)
    costs.forget("never seen")
