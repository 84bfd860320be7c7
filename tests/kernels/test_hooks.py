"""Hooks of a region: each hears once of what goes, and once of what comes or stays."""

from __future__ import annotations

import threading

import pytest
from kernel_support import GRANULE
from prefetch_support import SOON

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

LARGE = 2 * GRANULE
Call = tuple[str, int, int]


class Registry:
    """Registers what is mapped, as a network card would, and minds what it is told."""

    def __init__(self, region: ak.Region) -> None:
        self.calls: list[Call] = []
        self.registered = set[int]()
        for offset, size in region.mapped_ranges():
            self.registered |= granules(offset, size)
        self.hooks = region.add_hooks(before_unmap=self.before_unmap, after_map=self.after_map)

    def before_unmap(self, region: ak.Region, offset: int, size: int) -> None:
        self.calls.append(("goes", offset // LARGE, size // LARGE))
        assert granules(offset, size) <= self.registered, "it has heard of that already"
        self.registered -= granules(offset, size)

    def after_map(self, region: ak.Region, offset: int, size: int) -> None:
        self.calls.append(("comes", offset // LARGE, size // LARGE))
        assert not granules(offset, size) & self.registered, "it has heard of that already"
        self.registered |= granules(offset, size)


def granules(offset: int, size: int) -> set[int]:
    return set(range(offset // GRANULE, (offset + size) // GRANULE))


def mapped(region: ak.Region) -> set[int]:
    return set().union(*(granules(*run) for run in region.mapped_ranges()))


@pytest.fixture
def region(host: FaultyDevice) -> ak.Region:
    arena = ak.Arena(host, capacity_bytes=16 * LARGE, handle_bytes=LARGE)
    region = arena.reserve(8 * LARGE, owner="a")
    region.map(0, 4 * LARGE)
    return region


# Steps (what, offset, size or to the end), the calls that follow.
PLANS: dict[str, tuple[list[tuple[str, int, int | None]], list[Call]]] = {
    "the same range twice": (
        [("unmap", 0, None), ("map", 0, 4), ("unmap", 0, None)],
        [("goes", 0, 4)],
    ),
    "a part first": (
        [("unmap", 0, 2), ("map", 0, 2), ("unmap", 0, None), ("map", 1, 4)],
        [("goes", 0, 4), ("comes", 1, 4)],
    ),
    "mapped twice": (
        [("map", 4, 2), ("unmap", 4, 2), ("map", 4, 2)],
        [("comes", 4, 2)],
    ),
    "mapped and taken away again": ([("map", 4, 2), ("unmap", 4, 2)], []),
    "neighbours by several steps": (
        [("unmap", 0, 1), ("unmap", 1, 1), ("unmap", 3, 1), ("map", 5, 1), ("map", 6, 1)],
        [("goes", 0, 2), ("goes", 3, 1), ("comes", 5, 2)],
    ),
    "new memory at an old place": (
        [("unmap", 1, 2), ("map", 1, 2)],
        [("goes", 1, 2), ("comes", 1, 2)],
    ),
}


def commit(region: ak.Region, steps: list[tuple[str, int, int | None]]) -> None:
    with region.arena.transaction() as tx:
        for what, offset, size in steps:
            step = tx.map if what == "map" else tx.unmap
            step(region, offset * LARGE, None if size is None else size * LARGE)


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_touches_a_region_twice_tells_once(region: ak.Region, plan: str) -> None:
    steps, expected = PLANS[plan]
    registry = Registry(region)
    commit(region, steps)
    assert registry.calls == expected
    assert registry.registered == mapped(region)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("persistent", [False, True])
def test_after_a_failure_what_stays_is_told_once(
    host: FaultyDevice, region: ak.Region, plan: str, persistent: bool
) -> None:
    registry = Registry(region)
    for n in range(1, 100):
        host.reset()
        host.fail_call(n, persistent=persistent)
        before = mapped(region)
        try:
            commit(region, PLANS[plan][0])
        except ak.DriverError as error:
            host.reset()
            assert mapped(region) == registry.registered
            if not persistent:
                assert mapped(region) == before
            elif error.quarantined:
                if region.mapped_bytes:
                    region.unmap()
                region.map(0, 4 * LARGE)
        else:
            break
    assert n > 1
    host.reset()
    assert registry.registered == mapped(region)


def test_what_is_mapped_anew_while_hooks_run_is_told_of_as_it_is(region: ak.Region) -> None:
    others = [True]

    def remap(region: ak.Region, offset: int, size: int) -> None:
        if others:
            others.pop()
            region.unmap(0, LARGE)
            region.map(0, LARGE)

    region.add_hooks(before_unmap=remap)
    registry = Registry(region)
    region.unmap(0, 2 * LARGE)
    assert registry.calls == [("goes", 0, 1), ("comes", 0, 1), ("goes", 0, 2)]
    assert registry.registered == mapped(region)


@pytest.mark.parametrize("whose", ["its own", "the next one"])
def test_what_a_hook_held_may_use_the_arena_when_it_goes(region: ak.Region, whose: str) -> None:
    """Taken away while a hook runs, hooks are held by the operation alone; not under its lock."""
    arena = region.arena
    seen: list[int] = []
    hooks: list[ak.Hooks] = []

    class Holder:
        def before_unmap(self, region: ak.Region, offset: int, size: int) -> None:
            hooks.pop().remove()

        def __del__(self) -> None:
            seen.append(arena.stats().owned_bytes)

    if whose == "the next one":
        region.add_hooks(before_unmap=lambda *_: hooks.pop().remove() if hooks else None)
    hooks.append(region.add_hooks(before_unmap=Holder().before_unmap))
    # A thread of its own: it would wait for itself.
    thread = threading.Thread(target=region.unmap, daemon=True)
    thread.start()
    thread.join(SOON)
    assert not thread.is_alive(), "it waits for the lock that it has"
    assert seen == [4 * LARGE]
    assert region.mapped_bytes == 0


def test_a_hook_that_refuses_changes_nothing_and_the_others_hear_that_it_stays(
    region: ak.Region,
) -> None:
    registry = Registry(region)

    def refuse(region: ak.Region, offset: int, size: int) -> None:
        raise RuntimeError("not now")

    hooks = region.add_hooks(before_unmap=refuse)
    with pytest.raises(RuntimeError, match="not now"):
        region.close()
    assert registry.calls == [("goes", 0, 4), ("comes", 0, 4)]
    hooks.remove()
    region.close()
    assert registry.registered == set()
