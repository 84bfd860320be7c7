"""Generates while blocks move about and requests are aborted; checks the books at every switch.

Job, beside what the others take: `seed`; `victims`: model name -> requests that are aborted on the
way, at switches, wherever their KV is then. Reports tokens of `requests`, and what has happened.
"""

import random
from typing import Any

import numpy as np
from common import make_pool, prompts_of, read_job, report, token_ids_by_model

from aegaeon.switching.residency import KVUnit
from aegaeon.vllm_plugin.offline import OfflineEngine, OfflinePool
from aegaeon_kernels.kv_compact import Moves


def kv_of(pool: OfflinePool, name: str) -> KVUnit:
    return next(u for u in pool.switcher.models[name].units if isinstance(u, KVUnit))


def scramble(engine: OfflineEngine, unit: KVUnit, rng: random.Random) -> int:
    """Move some live blocks to any that are free: the opposite of compaction, by the same road."""
    live = list(unit.book.live())
    reserved = {*live, *unit.book.immovable()}
    free = [b for b in range(unit.layouts[0].num_blocks) if b not in reserved]
    count = rng.randint(0, min(len(live), len(free)))
    unit.move(
        Moves(
            np.array(rng.sample(live, count), dtype=np.int64),
            np.array(rng.sample(free, count), dtype=np.int64),
        )
    )
    return count


def check_books(pool: OfflinePool) -> None:
    for name, engine in pool.engines.items():
        unit = kv_of(pool, name)
        manager = engine.core.scheduler.kv_cache_manager
        blocks, managers = manager.block_pool, manager.coordinator.single_type_managers
        assert [block.block_id for block in blocks.blocks] == list(range(blocks.num_gpu_blocks))
        owned = {
            block.block_id
            for one in managers
            for table in one.req_to_blocks.values()
            for block in table
            if not block.is_null
        }
        free = {block.block_id for block in blocks.free_block_queue.get_all_free_blocks()}
        assert not owned & free, f"{name}: blocks of requests are free: {owned & free}"
        assert owned | free | {0} == set(range(blocks.num_gpu_blocks)), f"{name}: blocks are lost"
        live = set(unit.book.live())
        assert live >= owned
        if unit.holds_bytes:
            mapped = unit.region.mapped_ranges()
            for layout in unit.layouts:
                for offset, stride in layout.planes:
                    for block in live:
                        begin = offset + block * stride
                        assert any(
                            start <= begin and begin + layout.block_bytes <= start + size
                            for start, size in mapped
                        ), f"{name}: block {block} is not mapped"
        else:
            assert unit.mapped_bytes == 0
            assert unit.copies.keys() >= live, f"{name}: neither mapped nor stored"
        check_tables(engine, managers)
    slots = sum(kv_of(pool, n).num_copies * kv_of(pool, n).slot_bytes for n in pool.engines)
    stats = pool.switcher.kv_store.stats()
    assert stats.used_bytes == slots, "the store holds what is nobody's"
    arena = pool.switcher.arena.stats()
    assert arena.owned_bytes + arena.free_bytes + arena.quarantined_bytes == arena.capacity_bytes


def check_tables(engine: OfflineEngine, managers: Any) -> None:
    """What the worker takes the blocks of a request to be is what the scheduler does."""
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    for request in engine.core.scheduler.running:
        state = runner.requests.get(request.request_id)
        if state is None:
            continue
        tables = runner.input_batch.block_table.block_tables
        row = runner.input_batch.req_id_to_index.get(request.request_id)
        for group, one in enumerate(managers):
            known = state.block_ids[group]
            own = [block.block_id for block in one.req_to_blocks[request.request_id]]
            window = [(a, b) for a, b in zip(known, own, strict=False) if b != 0]
            assert all(a == b for a, b in window), (request.request_id, known, own)
            if row is not None:
                assert tables[group].block_table.np[row, : len(known)].tolist() == known


def main() -> None:
    job = read_job()
    rng = random.Random(job["seed"])
    with make_pool(job) as pool:
        num_moved = num_aborted = num_checked = 0
        victims = [
            (prompt.model, pool.submit(prompt))
            for prompt in prompts_of({"requests": job["victims"]})
        ]

        def after_switch(record: Any) -> None:
            nonlocal num_aborted, num_checked
            if victims and rng.random() < 0.3:
                name, request_id = victims.pop(rng.randrange(len(victims)))
                pool.engines[name].engine.abort_request([request_id])
                num_aborted += 1
            check_books(pool)
            num_checked += 1

        def with_scrambling(engine: OfflineEngine) -> Any:
            run_step = engine.run_step

            def step() -> bool:
                nonlocal num_moved
                done = run_step()
                if rng.random() < 0.5:
                    num_moved += scramble(engine, kv_of(pool, engine.name), rng)
                    check_books(pool)
                return done

            return step

        pool.switcher.on_switch = after_switch
        for engine in pool.engines.values():
            engine.run_step = with_scrambling(engine)  # type: ignore[method-assign]
        prompts = prompts_of(job)
        outputs = pool.generate(prompts)
        totals = pool.switcher.totals
        report(
            {
                "tokens": token_ids_by_model(prompts, outputs),
                "moved": num_moved,
                "aborted": num_aborted,
                "checked": num_checked,
                "compacted": totals.compacted_blocks,
                "kept": sum(
                    bool(record.shrunk) and not record.bytes_out for record in pool.switcher.records
                ),
                "bytes_out": totals.bytes_out,
            }
        )


if __name__ == "__main__":
    main()
