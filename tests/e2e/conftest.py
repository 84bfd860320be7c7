"""Tiny models, plain vLLM's answers to compare with, and programs in processes of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_support import KV_MEMORY, MAX_MODEL_LEN, PROGRAM_TIMEOUT_S, Requests, run_program

from aegaeon.tiny_model import write_tiny_model
from aegaeon.vllm_plugin.plain import run_alone


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """tiny_models("llama", "qwen3") -> name -> checkpoint; each is written once."""
    folder = tmp_path_factory.mktemp("models")
    written: dict[str, str] = {}

    def get(*archs: str) -> dict[str, str]:
        for arch in archs:
            if arch not in written:
                written[arch] = str(write_tiny_model(arch, folder / arch, seed=len(written)))
        return {arch: written[arch] for arch in archs}

    return get


@pytest.fixture(scope="session")
def program() -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """program("exact", job) -> the answer of tests/e2e/programs/exact.py."""

    def run(name: str, job: dict[str, Any]) -> dict[str, Any]:
        done = run_program(name, job)
        assert done.returncode == 0, done.stderr[-6000:]
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return run


@pytest.fixture(scope="session")
def plain_vllm() -> Callable[..., dict[str, list[list[int]]]]:
    """plain_vllm(models, requests, engine) -> the token ids of plain vLLM, with one model at a time
    in a process that knows nothing of us. Each set of jobs is run once.
    """
    known: dict[str, dict[str, list[list[int]]]] = {}

    def run(
        models: dict[str, str],
        requests: Requests,
        engine: dict[str, Any] | None = None,
        kv_memory: int = KV_MEMORY,
    ) -> dict[str, list[list[int]]]:
        jobs = [
            {
                "model": path,
                "max_model_len": MAX_MODEL_LEN,
                "kv_memory": kv_memory,
                "engine": engine or {},
                "requests": requests[name],
            }
            for name, path in models.items()
        ]
        key = json.dumps(jobs)
        if key not in known:
            answers = run_alone(jobs, timeout_s=PROGRAM_TIMEOUT_S)
            known[key] = {
                name: answer["token_ids"] for name, answer in zip(models, answers, strict=True)
            }
        return known[key]

    return run


@pytest.fixture
def tmpdir_of_servers(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder
