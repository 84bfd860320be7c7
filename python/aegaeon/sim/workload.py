"""Synthetic workloads: when requests come, for which model, how long they are.

Deterministic by seed, model by model: adding a model changes nothing for the others. Lengths are
lognormal, fitted to published medians and quantiles; where no data may be shipped (ShareGPT) the
figures are a stand-in and say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from aegaeon.sim.hardware import GpuGroup, Model
from aegaeon.sim.simulator import Request

# ---- lengths -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tokens:
    """Lognormal with this median and spread of the logarithm, cut to [least, most]."""

    median: float
    sigma: float
    least: int = 1
    most: int = 8192

    def draw(self, dice: Random) -> int:
        value = math.exp(math.log(self.median) + self.sigma * dice.gauss(0.0, 1.0))
        return max(self.least, min(self.most, round(value)))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output of one request. A share `long_share` of the outputs is `long_output`."""

    input: Tokens
    output: Tokens
    long_share: float = 0.0
    long_output: Tokens | None = None

    def draw(self, dice: Random) -> tuple[int, int]:
        prompt = self.input.draw(dice)
        if self.long_output is not None and dice.random() < self.long_share:
            return prompt, self.long_output.draw(dice)
        return prompt, self.output.draw(dice)

    def stretched(self, *, input: float = 1.0, output: float = 1.0) -> Lengths:
        """Prompts and outputs longer by these factors, limits included."""
        return replace(
            self,
            input=_stretched(self.input, input),
            output=_stretched(self.output, output),
            long_output=None if self.long_output is None else _stretched(self.long_output, output),
        )


def _stretched(tokens: Tokens, factor: float) -> Tokens:
    return replace(tokens, median=tokens.median * factor, most=round(tokens.most * factor))


LENGTHS: Mapping[str, Lengths] = {
    # Stand-in for ShareGPT with earlier turns in the prompt: means of about 300 and 240 tokens.
    "chat": Lengths(Tokens(165, 1.1, 4, 2048), Tokens(180, 0.8, 16, 1024)),
    # Azure LLM 2023: medians published, spreads fitted to the published 90th and 99th percentiles.
    "code": Lengths(Tokens(1469, 0.76, 3, 7437), Tokens(13, 1.24, 1, 1899)),
    "conversation": Lengths(Tokens(1020, 0.64, 3, 7437), Tokens(129, 0.72, 1, 1000)),
    # Assumptions: thinking makes a third of the answers long; long documents, short answers.
    "reasoning": Lengths(
        Tokens(300, 0.8, 8, 4096), Tokens(350, 0.6, 32, 1500), 0.33, Tokens(2200, 0.4, 800, 4000)
    ),
    "long-input": Lengths(Tokens(4000, 0.4, 1000, 7400), Tokens(150, 0.6, 16, 700)),
}

# ---- arrivals ----------------------------------------------------------------------------------


class Arrivals(Protocol):
    def times(self, dice: Random, rate: float, duration_s: float) -> Iterator[float]:
        """When requests come within [0, duration_s), `rate` per second on average."""


@dataclass(frozen=True, slots=True)
class Poisson:
    def times(self, dice: Random, rate: float, duration_s: float) -> Iterator[float]:
        now = dice.expovariate(rate)
        while now < duration_s:
            yield now
            now += dice.expovariate(rate)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gaps with this coefficient of variation; 1 is Poisson, above it come bursts."""

    cv: float

    def times(self, dice: Random, rate: float, duration_s: float) -> Iterator[float]:
        shape = 1.0 / self.cv**2
        scale = 1.0 / (rate * shape)
        # The first gap of a process that has been going on: long gaps are met more often.
        now = dice.gammavariate(shape + 1.0, scale) * dice.random()
        while now < duration_s:
            yield now
            now += dice.gammavariate(shape, scale)


@dataclass(frozen=True, slots=True)
class OnOff:
    """Poisson while on; both states last exponentially long, `on_s` and `off_s` on average."""

    on_s: float
    off_s: float

    def times(self, dice: Random, rate: float, duration_s: float) -> Iterator[float]:
        share = self.on_s / (self.on_s + self.off_s)
        on, now = dice.random() < share, 0.0
        while now < duration_s:
            until = min(duration_s, now + dice.expovariate(1.0 / (self.on_s if on else self.off_s)))
            if on:
                at = now + dice.expovariate(rate / share)
                while at < until:
                    yield at
                    at += dice.expovariate(rate / share)
            on, now = not on, until


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson whose rate is a sine of this period; it swings by `swing` (0 to 1) of the mean."""

    period_s: float = 86_400.0
    swing: float = 0.8
    phase: float = 0.0

    def times(self, dice: Random, rate: float, duration_s: float) -> Iterator[float]:
        peak = rate * (1 + self.swing)
        now = dice.expovariate(peak)
        while now < duration_s:
            turn = 2 * math.pi * (now / self.period_s + self.phase)
            if dice.random() * peak < rate * (1 + self.swing * math.sin(turn)):
                yield now
            now += dice.expovariate(peak)


@dataclass(frozen=True, slots=True)
class GroupBurst:
    """All models with the same `group` become busy together: `boost` times their mean rate in
    bursts of `burst_s`, every `every_s` on average; less in between, so that the mean is kept.
    """

    group: str = "group"
    burst_s: float = 20.0
    every_s: float = 200.0
    boost: float = 5.0

    def times(self, dice: Random, rate: float, duration_s: float) -> Iterator[float]:
        share = self.burst_s / self.every_s
        calm = max(0.0, (1 - share * self.boost) / (1 - share))
        peak = rate * max(self.boost, calm)
        shared = Random(f"{self.group}/{self.burst_s}/{self.every_s}")
        bursts = _bursts(shared, self.burst_s, self.every_s, duration_s)
        start_s, end_s = next(bursts, (math.inf, math.inf))
        now = dice.expovariate(peak)
        while now < duration_s:
            while now >= end_s:
                start_s, end_s = next(bursts, (math.inf, math.inf))
            if dice.random() * peak < rate * (self.boost if now >= start_s else calm):
                yield now
            now += dice.expovariate(peak)


def _bursts(
    dice: Random, burst_s: float, every_s: float, duration_s: float
) -> Iterator[tuple[float, float]]:
    now = dice.expovariate(1.0 / (every_s - burst_s))
    while now < duration_s:
        end = now + dice.expovariate(1.0 / burst_s)
        yield now, end
        now = end + dice.expovariate(1.0 / (every_s - burst_s))


@dataclass(frozen=True, slots=True)
class Beat:
    """At fixed times, again and again: `offsets_s` within each `period_s`. The rate is theirs."""

    period_s: float
    offsets_s: tuple[float, ...]

    def times(self, dice: Random, rate: float, duration_s: float) -> Iterator[float]:
        begin = 0.0
        while begin < duration_s:
            for offset in self.offsets_s:
                if begin + offset < duration_s:
                    yield begin + offset
            begin += self.period_s


def zipf_rates(number: int, total: float, alpha: float) -> list[float]:
    """Rates that fall as (i + 1) ** -alpha and add up to `total`."""
    weights = [(index + 1) ** -alpha for index in range(number)]
    return [total * weight / sum(weights) for weight in weights]


# ---- scenarios ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What one model is asked for."""

    model: Model
    rate: float
    arrivals: Arrivals = Poisson()
    lengths: Lengths = LENGTHS["chat"]


@dataclass(frozen=True)
class Scenario:
    """Models, what they are asked for, and the GPUs they share.

    trace: requests as recorded; they replace generated ones.
    """

    name: str
    loads: tuple[Load, ...]
    groups: tuple[GpuGroup, ...]
    duration_s: float = 300.0
    trace: tuple[Request, ...] | None = None

    @property
    def models(self) -> list[Model]:
        return [load.model for load in self.loads]

    @property
    def num_gpus(self) -> int:
        return sum(group.num_gpus for group in self.groups)

    def requests(self, seed: int) -> list[Request]:
        """In order of time; the recorded ones whatever the seed."""
        if self.trace is not None:
            return list(self.trace)
        return generate(self.loads, duration_s=self.duration_s, seed=seed)

    def at_slo(self, factor: float) -> Scenario:
        """With all deadlines multiplied."""
        return self._with_loads(lambda load: replace(load, model=load.model.scaled(factor)))

    def at_rate(self, factor: float) -> Scenario:
        """With all generated rates multiplied."""
        return self._with_loads(lambda load: replace(load, rate=load.rate * factor))

    def on(self, groups: Iterable[GpuGroup]) -> Scenario:
        """On other GPUs."""
        return replace(self, groups=tuple(groups))

    def lasting(self, duration_s: float) -> Scenario:
        """Cut, or generated for longer."""
        trace = self.trace
        if trace is not None:
            trace = tuple(request for request in trace if request.at_s < duration_s)
        return replace(self, duration_s=duration_s, trace=trace)

    def _with_loads(self, change: Callable[[Load], Load]) -> Scenario:
        return replace(self, loads=tuple(change(load) for load in self.loads))


def generate(loads: Sequence[Load], *, duration_s: float, seed: int) -> list[Request]:
    """The requests of all models in order of time."""
    requests = []
    for load in loads:
        dice = Random(f"{seed}/{load.model.name}")
        sizes = Random(f"{seed}/{load.model.name}/lengths")
        name, room = load.model.name, load.model.kv_tokens
        for at_s in load.arrivals.times(dice, load.rate, duration_s):
            prompt, output = load.lengths.draw(sizes)
            output = max(1, min(output, room - 1))
            requests.append(Request(at_s, name, max(1, min(prompt, room - output)), output))
    requests.sort()
    return requests
