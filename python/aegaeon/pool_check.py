"""What a pool needs, and whether it can be had: everything that is checked before a start."""

import socket
from ipaddress import ip_address
from pathlib import Path

import psutil

import aegaeon_kernels as ak
from aegaeon import checkpoint
from aegaeon.core.config import PoolConfig, format_bytes
from aegaeon.core.errors import AegaeonError, CapacityError, ConfigError

# Less than this is no place for blocks of a real model.
MIN_HOST_KV_BYTES = 2 << 20


def check_pool(pool: PoolConfig) -> None:
    """Everything about `pool` that can be checked without starting a process.

    Raises ModelLoadError for a checkpoint whose files are not right, CapacityError for a model
    that could never be resident, for one that would not fit beside the pinned ones, and for a
    pool whose host images would not fit into `host_memory`. ConfigError for an address beyond
    this machine without API keys.
    """
    _check_address(pool)
    device_memory_bytes = resolve_device_memory(pool)
    needs = {
        model.name: (checkpoint.weight_bytes(model.name, Path(model.model)), model.kv_memory)
        for model in pool.models
        if Path(model.model).is_dir()
    }
    images = sum(weights for weights, _ in needs.values())
    host_kv = pool.host_kv_memory or MIN_HOST_KV_BYTES
    if images + host_kv > pool.host_memory:
        raise CapacityError(
            f"the host images of all models need {format_bytes(images)}, and swapped KV needs "
            f"{format_bytes(host_kv)}; host_memory is {format_bytes(pool.host_memory)}: raise it, "
            f"or serve fewer models",
            needed_bytes=images + host_kv,
            available_bytes=pool.host_memory,
        )
    pinned = {model.name for model in pool.models if model.pin}
    for model in pool.models:
        if model.name not in needs:
            continue
        weights, kv = needs[model.name]
        beside = sum(sum(needs[name]) for name in pinned - {model.name} if name in needs)
        if weights + kv + beside > device_memory_bytes:
            others = f", beside pinned models of {format_bytes(beside)}" if beside else ""
            raise CapacityError(
                f"model {model.name!r} needs {format_bytes(weights)} weights + "
                f"{format_bytes(kv)} kv_memory = {format_bytes(weights + kv)}{others}, "
                f"device_memory is {format_bytes(device_memory_bytes)}: raise device_memory or "
                f"lower the model's kv_memory",
                needed_bytes=weights + kv,
                available_bytes=device_memory_bytes - beside,
            )


def _check_address(pool: PoolConfig) -> None:
    host = pool.server.host
    if pool.server.api_keys_file is None and not is_loopback(host):
        raise ConfigError(
            f"server.host: {host} can be reached from other machines: set server.api_keys_file "
            f"(`aegaeon key FILE` makes one), or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name counts when all its addresses do."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
        return bool(found) and all(ip_address(each).is_loopback for each in found)
    except (OSError, ValueError):
        return False


def resolve_device(pool: PoolConfig) -> str:
    """`host` or `cuda:N`."""
    available = ak.Device.available()
    if pool.device == "auto":
        return next((name for name in available if name != "host"), "host")
    wanted = "cuda:0" if pool.device == "cuda" else pool.device
    if wanted not in available:
        raise AegaeonError(
            f"device: {pool.device} is not there; this machine has: {', '.join(available)}"
        )
    return wanted


def resolve_host_kv_memory(pool: PoolConfig) -> int:
    """Bytes of the host KV store, for a pool that `check_pool` has passed."""
    if pool.host_kv_memory is not None:
        return pool.host_kv_memory
    images = sum(
        checkpoint.weight_bytes(model.name, Path(model.model))
        for model in pool.models
        if Path(model.model).is_dir()
    )
    wanted = sum(model.kv_memory for model in pool.models)
    return max(MIN_HOST_KV_BYTES, min(wanted, pool.host_memory - images))


def resolve_device_memory(pool: PoolConfig) -> int:
    """The arena's capacity in bytes: a whole number of pages of the device."""
    device = ak.Device(resolve_device(pool))
    _, total = device.memory_info()
    if device.kind == "host":
        total = psutil.virtual_memory().total
    wanted = pool.device_memory.resolve(total)
    return wanted // device.granularity_bytes * device.granularity_bytes
