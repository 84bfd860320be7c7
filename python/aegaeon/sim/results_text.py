"""The words of docs/results.md that do not depend on a run."""

HEAD = """# Simulated results

**Everything here is simulated, nothing was measured on a GPU.** One command regenerates it:

    python -m aegaeon.sim.results docs/results.md --seeds {seeds} \\
      --sweep-seeds {sweep} --duration {duration:g}

The policies, the cost models and the planner of evictions are those of the live instance
([simulation.md](simulation.md)); devices and workloads are models, with the assumptions at the end.
Published values are those of the paper (SOSP '25).

Sweeps: {sweep} seeds per point, presets: {seeds} seeds; arrivals for {duration:g} s, then all
requests are run to their end. *tokens*: share of tokens on time by their own deadlines; *requests*:
share of requests with 99 % of them on time; *artefact*: the published artefact's formula, which
forgives what follows a late token. `paper` is disaggregated (6 prefill, 10 decode GPUs of 16; the
smaller presets 1 of 2 to 2 of 4, `pingpong` with one GPU both phases on it); the others use every
GPU for both phases. Between two points of a sweep the line between them decides.
"""

PUBLISHED_FLEET = """28 models of 1.8 to 7B (TP=1) and 19 of 32 to 72B (TP=4) on H20: the fewest
GPUs with 90 % of tokens on time. Published: 1,192 GPUs before, 213 in the pool (-82 %). The
published rates (0.01 to 1.13, on average 0.037 requests per second) cannot load 213 GPUs to the
published 48 % with any profile known to us, so they must be rates of a part; compare the ratio, not
the numbers. `dedicated` gives each model GPUs of its own, none shared. One seed, arrivals for
600 s.
"""

DIFFERENCES = """## Where ours differ from the published values, and why

- **`paper` does not lead our `request-level`** at 0.1 requests per second, nor with stricter
  deadlines, though the published system leads ServerlessLLM. Ours starts a model at 40 GB/s
  without any other cost, on all 16 GPUs; the authors' simulation of it loads at 16 GB/s, computes
  prompts again and drops what has no token after 15 s. `paper` decodes on 10 GPUs of 16, and a
  request that misses its batch waits for a round.
- **`paper` with stricter deadlines** falls further behind: its quotas are up to 4 s however
  short the deadlines are. The published lead at 0.5x and 0.3x is over baselines weaker than ours.
- **`paper` at 10 s / 100 ms** comes near the published number of models (by the artefact's
  formula), with lengths of requests that are assumed.
- **Strict counting** (tokens, requests) is harder than the artefact's formula where requests are a
  little late: compare columns before comparing with published numbers.
- **The fleet**: the demand behind the published numbers of GPUs is not published.

"""

ASSUMPTIONS = """## Assumptions, and where they matter

- **Lengths.** ShareGPT may not be shipped; a lognormal stand-in with means of about 300 and 240
  tokens is used. Capacity is inversely proportional to the length of outputs.
- **Steps.** The published profiles are of eager vLLM. They are taken for all policies alike.
- **Link.** 62.5 % of the nominal PCIe bandwidth, 40 GB/s on H800: a switch of a 7B takes 0.38 s, of
  a 13B 0.65 s. The host holds all weights.
- **Memory.** KV caches are sized so that two of these models fit into a GPU, as the paper says of
  MuxServe; weights that are not needed now stay while there is room, for every policy.
- **`request-level`** binds late, loads at full link speed and never recomputes: the published
  ServerlessLLM is slower. It is the strongest form of it that we know, and comes out better here
  than in the paper.
- **`static`** never switches, and the models that do not fit get nothing: its attainment is at
  most the share of requests for those that fit. It is placed by the requests of the run itself, as
  no real placement could be, which flatters it where runs are short. Models on a GPU take turns
  step by step; MuxServe runs them at the same time.
- **`paper`** uses the same memory planner as ours and so keeps weights that the published system
  would drop; its split is fixed.
- **Routing** is part of what is compared: `slack` gets its requests late, by deadline, as
  [simulation.md](simulation.md) says; `paper` as in its two algorithms; the live server has one
  instance and no router yet.
- **Turns** of policies for both phases last at least 0.1 s here, which leaves out alternation after
  every step; requests of a seed are the same for every policy.
- **Not simulated**: failures, host memory that runs out, the engine's own overheads per turn,
  tensor parallel communication (steps are scaled by bytes), preemption inside the engine.
"""
