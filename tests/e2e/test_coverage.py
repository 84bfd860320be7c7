"""Every kind of model that docs/coverage.md calls supported, all in one pool, against it alone.

The pool holds one model at a time and switches after every step. Alone is plain vLLM in a process
of its own, with weights in the same format. Equal means token ids and log probabilities, or the
numbers of a vector, bit by bit.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import yaml
from e2e_support import KV_MEMORY, MAX_MODEL_LEN, PROGRAM_TIMEOUT_S, job_for
from PIL import Image

from aegaeon.local_server import local_server
from aegaeon.tiny_model import write_tiny_model
from aegaeon.tiny_special import write_tiny_adapter
from aegaeon.vllm_plugin.plain import run_alone

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SAMPLING = {"max_tokens": 16, "ignore_eos": True, "logprobs": 3}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


class Case(NamedTuple):
    """A model: its architecture, how vLLM runs it, and what its requests have beside a prompt."""

    arch: str
    vllm: Mapping[str, Any] = MappingProxyType({})
    each: Sequence[Mapping[str, Any]] = ({},)
    quantize: str | None = None


CASES = {
    "dense": Case("llama"),
    "tied-embeddings": Case("smollm"),
    "mixture-of-experts": Case("qwen3_moe"),
    "sliding-window": Case("mistral_window"),
    "sliding-window-in-some-layers": Case("gemma3"),
    "int4": Case("llama", quantize="int4"),
    "lora": Case(
        "qwen3",
        {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2},
        [{"adapter": "one"}, {}, {"adapter": "two"}],
    ),
    "embedding": Case("bert", {}, [{"sampling": None}]),
    "embedding-of-a-decoder": Case("qwen3", {"runner": "pooling"}, [{"sampling": None}]),
    "vision": Case("blip2", {}, [{"image": "one"}, {}, {"image": "two"}]),
    "structured-output": Case(
        "gemma",
        {},
        [
            {"sampling": {"structured_outputs": {"regex": "[a-c ]{12}z"}}},
            {},
            {"sampling": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 40}},
        ],
    ),
}


def requests_of(name: str, case: Case, files: dict[str, str]) -> list[dict[str, Any]]:
    """Six, greedy and seeded in turn, some longer than a KV block, two with the same beginning."""
    requests = []
    for i in range(6):
        more = dict(case.each[i % len(case.each)])
        sampling = {**SAMPLING, "temperature": 0.9 * (i % 2), "seed": 10 + i}
        prompt = "In the old harbour, by the fish market, " * (9 * (i % 3)) + f"{name} {i % 4}: go."
        for kind in ("adapter", "image"):
            if kind in more:
                more[kind] = files[f"{kind} {more[kind]} of {name}"]
        asked = more.pop("sampling", {})
        if asked is not None:
            asked = {**sampling, **asked}
        requests.append({"prompt": prompt, "sampling": asked, **more})
    return requests


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("coverage")
    return {
        name: str(write_tiny_model(case.arch, folder / name, seed=seed, quantize=case.quantize))
        for seed, (name, case) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module")
def requests(
    models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("files")
    files = {}
    for seed, which in enumerate(("one", "two")):
        adapter = write_tiny_adapter(models["lora"], folder / f"adapter-{which}", seed=seed)
        files[f"adapter {which} of lora"] = str(adapter)
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{which}.png")
        files[f"image {which} of vision"] = str(folder / f"{which}.png")
    return {name: requests_of(name, case, files) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def together(models, requests, program) -> dict[str, Any]:
    options = {name: dict(case.vllm) for name, case in CASES.items()}
    answer: dict[str, Any] = program("all_kinds", job_for(models, requests, vllm_of=options))
    return answer


def picture(file: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(file).read_bytes()).decode()}"


@pytest.fixture(scope="module")
def chats(requests) -> dict[str, dict[str, Any]]:
    """One conversation about an image, and one with an adapter."""
    sampling = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    image = {"type": "image_url", "image_url": {"url": picture(requests["vision"][0]["image"])}}
    look = [image, {"type": "text", "text": "What is this?"}]
    return {
        "vision": {"messages": [{"role": "user", "content": look}], "sampling": sampling},
        "lora": {
            "messages": [{"role": "user", "content": "What is this?"}],
            "sampling": sampling,
            "adapter": requests["lora"][0]["adapter"],
        },
    }


@pytest.fixture(scope="module")
def alone(models, requests, chats) -> dict[str, list[dict[str, Any]]]:
    """By case; and of each chat as `chat: <case>`, and of a model without its adapters."""
    base = [
        {key: value for key, value in request.items() if key != "adapter"}
        for request in requests["lora"]
    ]
    wanted = {"without adapters": ("lora", base)}
    wanted |= {f"chat: {name}": (name, [chat]) for name, chat in chats.items()}
    wanted |= {name: (name, requests[name]) for name in CASES}
    jobs = [
        {
            "model": models[name],
            "max_model_len": MAX_MODEL_LEN,
            "kv_memory": KV_MEMORY,
            "engine": dict(CASES[name].vllm),
            "requests": asked,
        }
        for name, asked in wanted.values()
    ]
    answers = run_alone(jobs, same_numbers=True, timeout_s=PROGRAM_TIMEOUT_S)
    return {name: answer["answers"] for name, answer in zip(wanted, answers, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_its_answers_are_those_of_the_model_alone_bit_by_bit(name, together, alone):
    assert together["answers"][name] == alone[name]
    assert len({json.dumps(answer) for answer in alone[name]}) > 3


def test_every_step_came_after_a_switch(together):
    assert together["warm"] > 0.9 * together["steps"]


def test_what_requests_ask_for_is_really_done(alone):
    """Adapters, images and structure change the answers: equality above says something."""
    lora, vision = alone["lora"], alone["vision"]
    assert lora[0]["token_ids"] != lora[4]["token_ids"]
    assert vision[0]["token_ids"] != vision[4]["token_ids"]
    assert all("vector" in answer for answer in alone["embedding"])
    assert all(len(answer["logprobs"]) >= 13 for answer in alone["structured-output"])


def test_a_request_without_an_adapter_gets_none_of_those_beside_it(together, alone):
    plain = alone["without adapters"]
    assert [together["answers"]["lora"][i] for i in (1, 4)] == [plain[i] for i in (1, 4)]


def test_images_and_adapters_are_served_through_the_chat_api(models, chats, alone, tmp_path):
    names = tuple(chats)
    adapter = {"name": "adapted", "path": chats["lora"]["adapter"]}
    options = {name: dict(CASES[name].vllm) for name in names}
    options["lora"]["lora_modules"] = [adapter]
    hosted = {name: models[name] for name in names}
    pool = tmp_path / "pool.yaml"
    pool.write_text(
        yaml.safe_dump(
            {
                "device": "host",
                "device_memory": job_for(hosted, {})["device_memory"],
                "defaults": {"kv_memory": KV_MEMORY, "max_model_len": MAX_MODEL_LEN},
                "models": [
                    {"model": path, "name": name, "vllm": options[name]}
                    for name, path in hosted.items()
                ],
                "scheduler": {"quantum": 1},
                "admin": {"socket": str(tmp_path / "admin.sock")},
            }
        )
    )
    said = {}
    with local_server(pool, log=tmp_path / "log") as server:
        for name, chat in chats.items():
            model = {"lora": "adapted"}.get(name, name)
            body = {"model": model, "messages": chat["messages"], **chat["sampling"]}
            body |= {"return_token_ids": True}
            answer = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            said[name] = answer.json()["choices"][0]["token_ids"]
        listed = httpx.get(f"{server.address}/v1/models").json()["data"]
    assert {name: alone[f"chat: {name}"][0]["token_ids"] for name in names} == said
    assert [model["id"] for model in listed] == ["vision", "lora", "adapted"]


REFUSED = [
    ("host", {"speculative_config": {"method": "ngram"}}, "speculative decoding is not switched"),
    ("cuda", {"enable_lora": True}, "LoRA adapters are not switched on this device yet"),
    ("host", {"tensor_parallel_size": 2}, "models on several devices are not hosted yet"),
    ("host", {"kv_transfer_config": {}}, "KV connectors are one per process"),
    ("host", {"enable_sleep_mode": True}, "the arena replaces vLLM's sleep mode"),
]


def test_what_cannot_be_switched_is_refused_with_the_reason(program):
    messages = program("refusals", {"wanted": [wanted[:2] for wanted in REFUSED]})["messages"]
    for message, (_, options, reason) in zip(messages, REFUSED, strict=True):
        assert f"model 'm': vllm.{next(iter(options))}: " in message
        assert reason in message
