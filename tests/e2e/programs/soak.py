"""Models of a pool, to which scripts are played; the order of everything else is random.

Which model runs next and for how many steps (1 to 32), who is brought in ahead, whose memory goes
first, and who is evicted without need: all drawn from `seed`. After every switch the books are
checked: the arena's bytes, and the host slots of each KV cache. Reports answers and counts.
`corrupt`: as in exact.py.
"""

import random
from typing import Any

from common import make_pool, read_job, report
from exact import corrupt
from play import Player

from aegaeon.sched.scheduler import PoolState, Turn
from aegaeon.switching.residency import KVUnit
from aegaeon.switching.switcher import SwitchRecord
from aegaeon.vllm_plugin.offline import OfflineEngine, OfflinePool


class RandomTurns:
    """A policy that knows nothing."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.quanta: set[int] = set()

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        names = [m.name for m in state.models if m.has_work and m.blocked_until <= now]
        if not names:
            return None
        others = [model.name for model in state.models]
        self._rng.shuffle(others)
        quantum = self._rng.choice((1, 1, 2, 3, 5, 8, 32))
        self.quanta.add(quantum)
        return Turn(
            model=self._rng.choice(names),
            max_steps=quantum,
            prefetch=tuple(others[: self._rng.randint(0, 2)]),
            evict_first=tuple(others),
        )


def hand_over(engine: OfflineEngine, requests: list[dict[str, Any]]) -> Player:
    """From now on a player adds the requests of `engine`, and counts its steps."""
    player = Player(engine.engine, requests)
    step = engine.engine.step

    def counted() -> Any:
        outputs = step()
        player.took(outputs)
        return outputs

    engine.engine.step = counted
    engine.poll = player.due  # type: ignore[method-assign]
    return player


class Books:
    """Counts switches, and those after which something does not add up."""

    def __init__(self, pool: OfflinePool) -> None:
        self._pool = pool
        self.wrong: list[str] = []
        self.switches = {"hot": 0, "warm": 0}
        pool.switcher.on_switch = self

    def __call__(self, record: SwitchRecord) -> None:
        self.switches[record.path] += 1
        switcher = self._pool.switcher
        stats = switcher.arena.stats()
        if stats.owned_bytes + stats.free_bytes + stats.quarantined_bytes != stats.capacity_bytes:
            self.wrong.append(f"arena after a switch to {record.model}: {stats}")
        if not switcher.is_resident(record.model):
            self.wrong.append(f"{record.model} is not resident after a switch to it")
        for name, memory in switcher.models.items():
            for unit in memory.units:
                if not isinstance(unit, KVUnit):
                    continue
                slots = list(unit.copies.values())
                if len(set(slots)) < len(slots):
                    self.wrong.append(f"two blocks of {name} share a place on the host")
                if not unit.holds_bytes and set(unit.book.live()) - unit.copies.keys():
                    self.wrong.append(f"a live block of {name} is nowhere")


def main() -> None:
    job = read_job()
    rng = random.Random(job["seed"])
    with make_pool(job) as pool:
        policy = pool.loop.policy = RandomTurns(rng)
        if "corrupt" in job:
            corrupt(pool, job["corrupt"])
        books = Books(pool)
        players = {n: hand_over(pool.engines[n], job["scripts"][n]) for n in job["models"]}
        evictions = 0
        while not all(player.done for player in players.values()):
            pool.loop.run_turn()
            if rng.random() < 0.1:
                pool.switcher.evict(rng.choice(list(players)))
                evictions += 1
        totals = pool.switcher.totals
        report(
            {
                "answers": {name: player.answers() for name, player in players.items()},
                "aborted": sum(player.aborted for player in players.values()),
                "switches": books.switches,
                "evictions": evictions,
                "prefetches": totals.prefetches,
                "bytes_ahead": totals.bytes_ahead,
                "wrong": books.wrong,
                "quanta": sorted(policy.quanta),
                "failed_models": pool.loop.counters.failed_models,
                "steps": pool.loop.counters.steps,
            }
        )


if __name__ == "__main__":
    main()
