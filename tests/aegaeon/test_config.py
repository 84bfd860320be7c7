"""pool.yaml: what is accepted, what it becomes, and what a person reads when it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.core import envs
from aegaeon.core.config import (
    MemoryBudget,
    PoolConfig,
    format_bytes,
    json_schema,
    load_pool,
    parse_bytes,
    parse_duration,
    with_model,
)
from aegaeon.core.errors import ConfigError
from aegaeon.core.units import parse_keep_alive

WritePool = Callable[[str], Path]


@pytest.fixture
def write_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WritePool:
    """Writes pool.yaml beside the (empty) checkpoints `a`, `b` and `c`."""
    for name in "abc":
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def write(text: str) -> Path:
        path = tmp_path / "pool.yaml"
        path.write_text(text)
        return path

    return write


def test_three_lines_are_a_pool(write_pool: WritePool) -> None:
    path = write_pool("models:\n  - model: a\n  - model: b\n")
    pool = load_pool(path)
    assert [model.name for model in pool.models] == ["a", "b"]
    assert [model.model for model in pool.models] == [str(path.parent / x) for x in "ab"]
    assert pool.device == "auto"
    assert pool.device_memory == MemoryBudget(share=0.9)
    assert (pool.scheduler.policy, pool.scheduler.quantum) == ("round-robin", 8)
    assert (pool.server.host, pool.server.port) == ("127.0.0.1", 8000)
    assert pool.server.max_queued_requests == 256
    assert pool.admin.socket == "auto"


def test_every_documented_key_is_read(write_pool: WritePool) -> None:
    path = write_pool("""
        device: host
        device_memory: 20GiB
        host_memory: 64GiB
        host_kv_memory: 8GiB
        defaults: {slo: {ttft_ms: 10000, tpot_ms: 100}, max_model_len: 4096, keep_alive: 10m,
                   kv_memory: 16MiB}
        models:
          - model: ./a
            name: qwen3
            aliases: [qwen, org/qwen3]
            slo: {ttft_ms: 2000, tpot_ms: 50}
            pin: true
            priority: -1
            keep_alive: -1
            vllm: {quantization: fp8}
        scheduler: {policy: round-robin, quantum: 1}
        server: {host: 0.0.0.0, port: 0, api_keys_file: null, max_queued_requests: 4,
                 max_body_bytes: 1MiB}
        admin: {socket: run/admin.sock}
    """)
    pool = load_pool(path)
    model = pool.models[0]
    assert pool.device_memory.resolve(0) == 20 << 30
    assert (pool.host_memory, pool.host_kv_memory) == (64 << 30, 8 << 30)
    assert (model.slo.ttft_ms, model.slo.tpot_ms) == (2000, 50)
    assert (model.max_model_len, model.kv_memory) == (4096, 16 << 20)
    assert (model.pin, model.priority, model.keep_alive) == (True, -1, None)
    assert model.vllm == {"quantization": "fp8"}
    assert pool.model("org/qwen3") is model
    assert pool.model("Qwen3") is None
    assert pool.server.max_body_bytes == 1 << 20
    assert pool.admin.socket == str(path.parent / "run/admin.sock")


def test_a_model_inherits_what_it_does_not_say(write_pool: WritePool) -> None:
    pool = load_pool(
        write_pool("""
            defaults: {slo: {ttft_ms: 900}, kv_memory: 8MiB, keep_alive: 5s, max_model_len: 64}
            models:
              - {model: a, slo: {tpot_ms: 7}, kv_memory: 4096}
              - {model: b, max_model_len: null}
        """)
    )
    a, b = pool.models
    assert (a.slo.ttft_ms, a.slo.tpot_ms, a.kv_memory, a.keep_alive) == (900, 7, 4096, 5)
    assert (b.slo.ttft_ms, b.slo.tpot_ms, b.kv_memory) == (900, 100, 8 << 20)
    assert (a.max_model_len, b.max_model_len) == (64, None)


def test_a_pool_cannot_be_changed_and_survives_json(write_pool: WritePool) -> None:
    pool = load_pool(
        write_pool("models: [{model: a, aliases: [x], keep_alive: -1, vllm: {seed: 3}}]")
    )
    with pytest.raises(ValueError, match="frozen"):
        pool.device = "host"  # type: ignore[misc]
    assert PoolConfig.model_validate_json(pool.model_dump_json()) == pool


BAD_POOLS = {
    "unknown key": (
        "models: [{model: a}]\nserver:\n  prot: 80\n",
        "pool.yaml:3: server.prot: unknown key; did you mean 'port'? valid keys: host, port,",
    ),
    "unknown key at the top": (
        "modles: [{model: a}]\nmodels: [{model: a}]\n",
        "pool.yaml:1: modles: unknown key; did you mean 'models'?",
    ),
    "unknown key of a model": (
        "models:\n- model: a\n- model: b\n  piority: 1\n",
        "pool.yaml:4: models[1].piority: unknown key; did you mean 'priority'?",
    ),
    "unknown key like no other": (
        "models: [{model: a}]\nzzzz: 1\n",
        "pool.yaml:2: zzzz: unknown key; valid keys: device,",
    ),
    "share": (
        "models: [{model: a}]\ndevice_memory: 110%\n",
        "pool.yaml:2: device_memory: got '110%'; expected a share such as '90%', or a size",
    ),
    "size": (
        "models: [{model: a}]\nhost_memory: 64 gigs\n",
        "pool.yaml:2: host_memory: got '64 gigs'; expected a size such as '20GiB'",
    ),
    "no size": (
        "models: [{model: a, kv_memory: 0}]\n",
        "models[0].kv_memory: got 0; expected a size such as '20GiB', '512MiB' or plain bytes, "
        "more than nothing",
    ),
    "duration": (
        "models: [{model: a}]\ndefaults: {keep_alive: soon}\n",
        "pool.yaml:2: defaults.keep_alive: got 'soon'; expected a duration such as '10m'",
    ),
    "device": (
        "models: [{model: a}]\ndevice: gpu\n",
        "pool.yaml:2: device: got 'gpu'; expected auto, host, cuda or cuda:N",
    ),
    "policy": (
        "models: [{model: a}]\nscheduler: {policy: fastest}\n",
        "pool.yaml:2: scheduler.policy: got 'fastest'; expected one of: round-robin",
    ),
    "quantum": (
        "models: [{model: a}]\nscheduler: {quantum: 0}\n",
        "scheduler.quantum: got 0; expected at least 1",
    ),
    "boolean": ("models: [{model: a, pin: 1}]\n", "models[0].pin: got 1; expected true or false"),
    "whole number": (
        "models: [{model: a, max_model_len: '4k'}]\n",
        "models[0].max_model_len: got '4k'; expected a whole number",
    ),
    "number": (
        "models: [{model: a, slo: {ttft_ms: fast}}]\n",
        "models[0].slo.ttft_ms: got 'fast'; expected a number",
    ),
    "negative latency": (
        "models: [{model: a, slo: {tpot_ms: -1}}]\n",
        "models[0].slo.tpot_ms: got -1; expected more than 0",
    ),
    "text": (
        "models: [{model: a, name: on}]\n",
        "models[0].name: got True; expected text (put it in quotes)",
    ),
    "name": (
        "models: [{model: a, name: 'my model'}]\n",
        "models[0].name: got 'my model'; expected letters, digits and . _ : / -",
    ),
    "empty model": (
        "models: [{model: ''}]\n",
        "models[0].model: got ''; expected text that is not",
    ),
    "port": (
        "models: [{model: a}]\nserver: {port: 99999}\n",
        "server.port: got 99999; expected at most 65535",
    ),
    "keys file": (
        "models: [{model: a}]\nserver: {api_keys_file: keys.txt}\n",
        "pool.yaml:2: server.api_keys_file: got 'keys.txt'; expected a file of keys",
    ),
    "long socket": (
        f"models: [{{model: a}}]\nadmin: {{socket: /{'s' * 120}}}\n",
        "expected a path of at most 107 bytes",
    ),
    "duplicate name": (
        "models:\n- model: a\n- model: b\n  name: a\n",
        "pool.yaml:3: models[1]: the name 'a' is already taken by models[0]",
    ),
    "duplicate alias": (
        "models: [{model: a, aliases: [x]}, {model: b, aliases: [x]}]\n",
        "models[1]: the name 'x' is already taken by models[0]",
    ),
    "alias of itself": (
        "models: [{model: a, aliases: [a]}]\n",
        "models[0]: the name 'a' is already taken by models[0]",
    ),
    "missing path": (
        "models:\n- model: a\n- model: ./gone\n",
        "pool.yaml:3: models[1].model: got './gone'; expected a directory with a checkpoint",
    ),
    "not in the hub cache": (
        "models: [{model: org/gone}]\n",
        "models[0].model: got 'org/gone'; expected a directory with a checkpoint",
    ),
    "no models": ("device: host\n", "models: the key is required and missing"),
    "empty models": ("models: []\n", "models: the pool has no models; expected at least one"),
    "models not a list": ("models: a\n", "models: got 'a'; expected a list"),
    "model not a mapping": ("models: [a]\n", "models[0]: got 'a'; expected a mapping"),
    "model without checkpoint": (
        "models: [{name: a}]\n",
        "models[0].model: the key is required and missing",
    ),
    "empty file": ("", "got nothing; expected a mapping with at least the key 'models'"),
    "a list": ("- 1\n", "pool.yaml:1: got a list; expected a mapping"),
    "not YAML": (
        "models:\n  - model: a\n bad: [\n",
        "pool.yaml:3: not valid YAML: expected <block end>",
    ),
    "two documents": (
        "models: []\n---\nmodels: []\n",
        "not valid YAML: but found another document",
    ),
    "a tag": ("models: !!python/object:os.system x\n", "pool.yaml:1: not valid YAML: could not"),
    "an unprintable character": ("models: \x00\n", "not valid YAML"),
    "key given twice": (
        "device: host\nmodels: [{model: a}]\ndevice: cuda\n",
        "pool.yaml:3: device: the key is given twice",
    ),
    "endless alias": ("models: &m [*m]\n", "models[0]: an alias contains itself"),
    "unset variable": (
        "models: [{model: '${env.AEGAEON_TEST_UNSET}'}]\n",
        "pool.yaml:1: models[0].model: got '${env.AEGAEON_TEST_UNSET}'; "
        "expected the name of an environment variable that is set",
    ),
    "option the pool decides": (
        "models: [{model: a, vllm: {max-model-len: 12}}]\n",
        "models[0].vllm.max-model-len: this option of vLLM is not accepted here; "
        "use `max_model_len`",
    ),
    "remote code": (
        "models: [{model: a, vllm: {trust_remote_code: true}}]\n",
        "models[0].vllm.trust_remote_code: this option of vLLM is not accepted here",
    ),
}


@pytest.mark.parametrize("case", BAD_POOLS)
def test_a_bad_pool_is_refused_with_a_message_that_helps(write_pool: WritePool, case: str) -> None:
    text, message = BAD_POOLS[case]
    path = write_pool(text)
    with pytest.raises(ConfigError) as caught:
        load_pool(path)
    assert message in str(caught.value)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())


def test_all_faults_are_reported_together(write_pool: WritePool) -> None:
    path = write_pool("device: gpu\nmodels: [{model: a, pin: 3}]\nserver: {port: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_pool(path)
    assert len(str(caught.value).splitlines()) == 3


def test_a_bad_default_is_reported_once(write_pool: WritePool) -> None:
    path = write_pool("defaults: {kv_memory: x}\nmodels: [{model: a}, {model: b}]\n")
    with pytest.raises(ConfigError) as caught:
        load_pool(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "pool.yaml"
    make(path)
    with pytest.raises(ConfigError, match=r"pool\.yaml: cannot be read: "):
        load_pool(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    path.write_bytes(b"models: \xff\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text: invalid start byte at byte 8"):
        load_pool(path)


def test_the_environment_is_substituted(
    write_pool: WritePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOL_NAME", "b")
    monkeypatch.setenv("POOL_PORT", "4711")
    pool = load_pool(
        write_pool("""
            models: [{model: 'a', name: "x-${env.POOL_NAME}-${env.POOL_NAME}"}]
            server:
              port: ${env.POOL_PORT}
        """)
    )
    assert pool.models[0].name == "x-b-b"
    assert pool.server.port == 4711


def test_a_quoted_variable_stays_text(
    write_pool: WritePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOL_PORT", "4711")
    path = write_pool("models: [{model: a}]\nserver: {port: '${env.POOL_PORT}'}\n")
    with pytest.raises(ConfigError, match="got '4711'; expected a whole number"):
        load_pool(path)


def test_yaml_anchors_can_be_used(write_pool: WritePool) -> None:
    pool = load_pool(
        write_pool("models: [&m {model: a, kv_memory: 4096}, {<<: *m, name: other, pin: true}]")
    )
    assert [(m.name, m.kv_memory, m.pin) for m in pool.models] == [
        ("a", 4096, False),
        ("other", 4096, True),
    ]


def test_a_model_in_the_hub_cache_keeps_its_name(write_pool: WritePool) -> None:
    path = write_pool("models: [{model: org/qwen}]")
    (path.parent / "hub" / "models--org--qwen").mkdir(parents=True)
    assert load_pool(path).models[0].model == "org/qwen"
    assert load_pool(path).models[0].name == "qwen"


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["models"]
    model = schema["$defs"]["ModelConfig"]
    assert {"model", "aliases", "slo", "kv_memory", "vllm"} <= set(model["properties"])
    assert schema["properties"]["device_memory"]["type"] == ["integer", "string"]
    policies = schema["$defs"]["SchedulerConfig"]["properties"]["policy"]["enum"]
    assert {"round-robin", "slack"} <= set(policies)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("16MiB", 16 << 20),
        ("1.5 GiB", 3 << 29),
        ("20gib", 20 << 30),
        ("3GB", 3 * 10**9),
        ("4096", 4096),
        ("7B", 7),
        (12, 12),
    ],
)
def test_sizes(text: str | int, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("value", ["", "GiB", "-1GiB", "1 GiBs", "1e9", True, None, 1.5, "0", -4])
def test_what_is_no_size_raises(value: object) -> None:
    with pytest.raises(ValueError, match="expected a size such as '20GiB'"):
        parse_bytes(value)  # type: ignore[arg-type]


@given(st.integers(min_value=1, max_value=1 << 50))
def test_a_formatted_size_reads_back_within_its_digits(size_bytes: int) -> None:
    assert abs(parse_bytes(format_bytes(size_bytes)) - size_bytes) <= size_bytes * 0.006


def test_formatted_sizes() -> None:
    sizes = [0, 1, 1023, 1024, 1536, 64 << 20, 123456789, 90 << 30, 5 << 40]
    texts = ["0 B", "1 B", "1023 B", "1 KiB", "1.5 KiB", "64 MiB", "118 MiB", "90 GiB", "5 TiB"]
    assert [format_bytes(size) for size in sizes] == texts


def test_durations() -> None:
    assert [parse_duration(x) for x in ("10m", "1h30m", "250ms", "2d", "3.5", 7)] == (
        [600, 5400, 0.25, 172800, 3.5, 7]
    )
    assert parse_keep_alive(-1) is None
    assert parse_keep_alive("-1") is None
    assert parse_keep_alive(0) == 0


@pytest.mark.parametrize("value", ["", "m", "10 m", "1m!", -2, "-5s", True, None, float("nan")])
def test_what_is_no_duration_raises(value: object) -> None:
    with pytest.raises(ValueError, match="expected a duration such as '10m'"):
        parse_duration(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="-1 for ever"):
        parse_keep_alive(value)  # type: ignore[arg-type]


def test_a_share_is_of_the_memory_there_is() -> None:
    assert MemoryBudget.parse("25%").resolve(1 << 30) == 1 << 28
    assert MemoryBudget.parse("1MiB").resolve(1 << 30) == 1 << 20


# ---- environment -------------------------------------------------------------------------------


def test_unset_and_empty_variables_mean_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        for name in envs.NAMES:
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert envs.enable() is False
        assert envs.log_level() == "INFO"
        assert envs.poison_memory() is False


def test_variables_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEGAEON_ENABLE", "1")
    monkeypatch.setenv("AEGAEON_LOG_LEVEL", "debug")
    monkeypatch.setenv("AEGAEON_POISON_MEMORY", "1")
    assert envs.enable() is True
    assert envs.poison_memory() is True
    assert envs.log_level() == "DEBUG"


@pytest.mark.parametrize(
    ("name", "read", "value"),
    [
        ("AEGAEON_ENABLE", envs.enable, "yes"),
        ("AEGAEON_LOG_LEVEL", envs.log_level, "loud"),
        ("AEGAEON_POISON_MEMORY", envs.poison_memory, "2"),
    ],
)
def test_a_malformed_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[], object], value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"environment variable {name}: got '{value}'; expected"):
        read()


def test_a_child_environment_is_a_changed_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEGAEON_LOG_LEVEL", "ERROR")
    child = envs.child_environment({"AEGAEON_ENABLE": "1", "AEGAEON_LOG_LEVEL": None})
    assert child["AEGAEON_ENABLE"] == "1"
    assert "AEGAEON_LOG_LEVEL" not in child
    assert envs.log_level() == "ERROR"


def test_a_model_that_is_added_inherits_the_defaults_and_is_checked_like_the_others(
    write_pool, tmp_path
):
    pool = load_pool(
        write_pool("defaults: {kv_memory: 64MiB, slo: {ttft_ms: 7}}\nmodels: [{model: ./a}]")
    )
    added = with_model(pool, {"model": str(tmp_path / "b"), "slo": {"tpot_ms": 3}})
    assert [model.name for model in added.models] == ["a", "b"]
    assert added.models[1].kv_memory == 64 << 20
    assert (added.models[1].slo.ttft_ms, added.models[1].slo.tpot_ms) == (7, 3)
    for entry, reason in (
        ({"model": str(tmp_path / "b"), "name": "a"}, "'a' is already taken"),
        ({"model": str(tmp_path / "none")}, "none"),
        ({"model": "./b"}, "absolute path"),
        ({"model": str(tmp_path / "b"), "kv_memory": "lots"}, "kv_memory: .*lots"),
        ({"model": str(tmp_path / "b"), "nonsense": 1}, "nonsense"),
        ({}, "model"),
    ):
        with pytest.raises(ConfigError, match=reason):
            with_model(pool, entry)
