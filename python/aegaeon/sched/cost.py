"""What steps, prefills and switches take: linear models, fitted to what the caller measures.

    step     a + c * requests + k * context tokens     one token of each request
    prefill  p0 + p1 * tokens                          one batch of prompts
    switch   s0 + bytes / bandwidth                    nothing missing: 0

The published profiles (least-squares fits of measurements with eager vLLM, prompts of at most 4,096
tokens per batch) are the priors; a few measurements outweigh them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


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


class LinearFit:
    """y = a + b * x by least squares over the recent past, from a prior of two points.

    Each observation weighs FORGET times what the next one does. One that is CLIP times what was
    expected, after the first few, counts as CLIP times: a hiccup of the machine is no trend.
    Neither a nor b becomes negative; where all x are alike, b stays as it was.
    """

    FORGET = 0.95
    CLIP = 5.0
    TRUSTED_AFTER = 8

    __slots__ = ("_count", "_sums", "intercept", "slope")

    def __init__(self, intercept: float, slope: float, typical_x: float) -> None:
        self.intercept, self.slope = intercept, slope
        self._count = 0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        for x in (0.0, typical_x):
            self._add(x, intercept + slope * x)

    def observe(self, x: float, y: float) -> None:
        self._count += 1
        if self._count > self.TRUSTED_AFTER:
            y = min(y, self.CLIP * (self.intercept + self.slope * x))
        self._add(x, y)
        n, sx, sy, sxx, sxy = self._sums
        spread = n * sxx - sx * sx
        if spread > 1e-9 * n * sxx:
            self.slope = max(0.0, (n * sxy - sx * sy) / spread)
        self.intercept = (sy - self.slope * sx) / n
        if self.intercept < 0.0:
            self.intercept, self.slope = 0.0, sxy / sxx

    def _add(self, x: float, y: float) -> None:
        n, sx, sy, sxx, sxy = (self.FORGET * each for each in self._sums)
        self._sums = (n + 1.0, sx + x, sy + y, sxx + x * x, sxy + x * y)


@dataclass(slots=True)
class CostModel:
    """Costs of the models of one device.

    profiles: priors by model name; others start from `default`.
    link_bytes_per_s, switch_s0: prior of the switch; `link_bytes_per_s` is effective, not nominal.
    """

    profiles: dict[str, Profile] = field(default_factory=dict)
    default: Profile = DEFAULT_PROFILE
    link_bytes_per_s: float = PCIE5_BYTES_PER_S * PUBLISHED_LINK_SHARE
    switch_s0: float = 0.0
    _steps: dict[str, LinearFit] = field(default_factory=dict)
    _prefills: dict[str, LinearFit] = field(default_factory=dict)
    _switch: LinearFit | None = None

    def observe_step(self, model: str, num_requests: int, seconds: float) -> None:
        """A decode step of `num_requests` took this long."""
        profile = self.profiles.get(model, self.default)
        fit = self._steps.get(model)
        if fit is None:
            fit = LinearFit(profile.step_s, profile.step_per_request_s, typical_x=8.0)
            self._steps[model] = fit
        fit.observe(num_requests, seconds)
        self.profiles[model] = replace(profile, step_s=fit.intercept, step_per_request_s=fit.slope)

    def observe_prefill(self, model: str, num_tokens: int, seconds: float) -> None:
        """One batch of prompts, `num_tokens` in sum and nothing else, took this long."""
        profile = self.profiles.get(model, self.default)
        fit = self._prefills.get(model)
        if fit is None:
            fit = LinearFit(profile.prefill_s, profile.prefill_per_token_s, typical_x=512.0)
            self._prefills[model] = fit
        fit.observe(num_tokens, seconds)
        self.profiles[model] = replace(
            profile, prefill_s=fit.intercept, prefill_per_token_s=fit.slope
        )

    def observe_switch(self, missing_bytes: int, seconds: float) -> None:
        """A switch that brought in `missing_bytes` took this long; one without is not counted."""
        if not missing_bytes or not seconds > 0:
            return
        if self._switch is None:
            per_byte_s = 1.0 / self.link_bytes_per_s
            self._switch = LinearFit(self.switch_s0, per_byte_s, typical_x=float(missing_bytes))
        self._switch.observe(float(missing_bytes), seconds)
        self.switch_s0 = self._switch.intercept
        self.link_bytes_per_s = 1.0 / max(self._switch.slope, 1e-15)

    def forget(self, model: str) -> None:
        """The model is gone, or another one has its name now."""
        for known in (self.profiles, self._steps, self._prefills):
            known.pop(model, None)

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
