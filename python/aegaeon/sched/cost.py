"""What steps, prefills and switches take: linear models, fitted to what the caller measures.

    step     a + c * requests + k * context tokens     one token of each request
    prefill  p0 + p1 * tokens                          one batch of prompts
    switch   s0 + bytes / bandwidth                    nothing missing: 0

The published profiles (least-squares fits of measurements with eager vLLM, prompts of at most 4,096
tokens per batch) are the priors; a few measurements outweigh them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of a step, and more per request and per token of context; the same of a prefill."""

    step_s: float
    step_per_request_s: float
    step_per_context_token_s: float
    prefill_s: float
    prefill_per_token_s: float


def _published(a: float, c: float, p0: float, p1: float) -> Profile:
    return Profile(a * 1e-3, c * 1e-6, 0.0, p0 * 1e-3, p1 * 1e-6)


# (model, GPU) -> profile.
PUBLISHED: Mapping[tuple[str, str], Profile] = {
    ("Qwen2.5-7B", "H800"): _published(8.3, 104, 5.6, 22),
    ("Qwen2.5-7B", "H100"): _published(9.1, 68, 5.8, 21),
    ("Qwen2.5-7B", "A100"): _published(12.1, 135, 7.4, 59),
    ("Qwen2.5-7B", "H20"): _published(10.6, 181, 10, 99),
    ("Qwen2.5-7B", "A10"): _published(32.1, 251, 7.2, 218),
    ("Yi-1.5-6B", "A10"): _published(28.1, 193, 8.2, 171),
    ("Yi-1.5-9B", "H800"): _published(11.7, 101, 7.4, 29),
    ("Yi-1.5-9B", "A100"): _published(15.1, 149, 8.4, 78),
    ("Llama-2-13B", "H800"): _published(12.8, 155, 6.8, 45),
    ("Llama-2-13B", "H100"): _published(12.7, 108, 7.2, 41),
    ("Llama-2-13B", "A100"): _published(19.7, 242, 16, 120),
    ("Llama-2-13B", "H20"): _published(19.5, 383, 18, 191),
}
# Nominal bytes per second of PCIe x16, and the share of it that the paper counts on for weights.
PCIE4_BYTES_PER_S = 32e9
PCIE5_BYTES_PER_S = 64e9
PUBLISHED_LINK_SHARE = 0.625

DEFAULT_PROFILE = PUBLISHED["Qwen2.5-7B", "H800"]


@dataclass(slots=True)
class CostModel:
    """Costs of the models of one device.

    profiles: priors by model name; others start from `default`.
    link_bytes_per_s, switch_s0: prior of the switch; `link_bytes_per_s` is effective, not nominal.
    """

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    default: Profile = DEFAULT_PROFILE
    link_bytes_per_s: float = PCIE5_BYTES_PER_S * PUBLISHED_LINK_SHARE
    switch_s0: float = 0.0

    def step_s(self, model: str, num_requests: int, context_tokens: int = 0) -> float:
        """One decode step of `num_requests`."""
        p = self.profiles.get(model, self.default)
        return (
            p.step_s
            + p.step_per_request_s * num_requests
            + p.step_per_context_token_s * context_tokens
        )

    def prefill_s(self, model: str, num_tokens: int) -> float:
        """The prompts of one batch, `num_tokens` in sum."""
        p = self.profiles.get(model, self.default)
        return p.prefill_s + p.prefill_per_token_s * num_tokens

    def switch_s(self, missing_bytes: int) -> float:
        """Bringing in what is missing; 0 when nothing is."""
        return self.switch_s0 + missing_bytes / self.link_bytes_per_s if missing_bytes else 0.0
