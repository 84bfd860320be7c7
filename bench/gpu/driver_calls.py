"""What does each virtual memory call cost, by handle size?

Limit: none that is known. Published figures (A100, L40S) differ six-fold for create and say nothing
about one set_access over many handles, so every GPU is to be measured. The host-side cost of the
calls is what a switch pays besides its copy.
"""

from collections.abc import Iterator
from typing import Any

from measure import quantiles
from setting import GIB, MIB, Result, Setting, Stopwatch, require

from aegaeon_kernels import _C

HANDLE_MIB = (2, 4, 8, 16, 32, 64, 128)
PHASES = {
    # Calls per round, one for each handle; or "batched": one call for all of them.
    "create": "each",
    "map": "each",
    "access_one_by_one": "each",
    "access_batched": "batched",
    "unmap_batched": "batched",
    "release": "each",
}


def measure_driver_calls(setting: Setting) -> Iterator[Result]:
    setting.require_device_memory(setting.table_bytes)
    for handle_mib in HANDLE_MIB:
        size = handle_mib * MIB
        if size % setting.device.granularity_bytes == 0:
            yield _table_row(setting, size)


def _table_row(setting: Setting, handle_bytes: int) -> Result:
    watch = Stopwatch()
    num_handles = setting.table_bytes // handle_bytes
    # The first creates may find memory that nobody has used; later ones find what was just
    # released, which the driver may have to scrub first.
    for round_idx in range(setting.rounds + 1):
        _one_round(setting.device._driver, watch, handle_bytes, num_handles)
        if round_idx == 0:
            first_create = watch["create"]
            watch = Stopwatch()
    row: dict[str, Any] = {
        "result": f"driver calls, handles of {handle_bytes // MIB} MiB",
        "handles": num_handles,
        **quantiles("first_create_us", first_create, scale=1e6),
    }
    gib = setting.table_bytes / GIB
    for phase, kind in PHASES.items():
        seconds = watch[phase]
        row |= quantiles(f"{phase}_us", seconds, scale=1e6)
        row[f"{phase}_ms_per_gib"] = sum(seconds) / setting.rounds / gib * 1e3
        if kind == "batched":
            row[f"{phase}_us_per_handle"] = sum(seconds) / len(seconds) / num_handles * 1e6
    return row


def _one_round(driver: _C.Driver, watch: Stopwatch, size: int, num_handles: int) -> None:
    total = size * num_handles
    handles = []
    code, address = driver.address_reserve(total, 0)
    require(code, "address_reserve")
    for _ in range(num_handles):
        with watch("create"):
            code, handle = driver.mem_create(size)
        require(code, "mem_create")
        handles.append(handle)

    def map_all() -> None:
        for i, handle in enumerate(handles):
            with watch("map"):
                code = driver.mem_map(address + i * size, size, 0, handle)
            require(code, "mem_map")

    def unmap_all() -> None:
        with watch("unmap_batched"):
            code = driver.mem_unmap(address, total)
        require(code, "mem_unmap")

    map_all()
    for i in range(num_handles):
        with watch("access_one_by_one"):
            code = driver.mem_set_access(address + i * size, size, _C.Access.READWRITE)
        require(code, "mem_set_access")
    unmap_all()
    map_all()
    with watch("access_batched"):
        code = driver.mem_set_access(address, total, _C.Access.READWRITE)
    require(code, "mem_set_access")
    unmap_all()
    for handle in handles:
        with watch("release"):
            code = driver.mem_release(handle)
        require(code, "mem_release")
    require(driver.address_free(address, total), "address_free")
