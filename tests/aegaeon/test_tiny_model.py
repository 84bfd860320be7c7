"""Random checkpoints: complete, reproducible, and worth comparing token by token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from aegaeon import tiny_model
from aegaeon.tiny_model import write_tiny_model
from aegaeon.tiny_special import write_tiny_adapter

# Those that continue a text; what the others are for is checked below, and in tests/e2e.
ARCHITECTURES = {
    name: architecture
    for name, architecture in tiny_model.ARCHITECTURES.items()
    if architecture.task == "generate"
}

PROMPTS = ("Hi there", "Why is the sky blue?", "Write a story about a ship.", "List five colours")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {arch: write_tiny_model(arch, folder / arch) for arch in ARCHITECTURES}


def greedy(path: Path, prompt: str, num_tokens: int) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model.generation_config.eos_token_id = None
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_a_model_says_varies_and_depends_on_the_prompt(
    checkpoints: dict[str, Path], arch: str
) -> None:
    answers = [greedy(checkpoints[arch], prompt, 24) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
    assert all(len(set(answer)) >= 8 for answer in answers)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_tokenizer_is_whole(checkpoints: dict[str, Path], arch: str) -> None:
    path = checkpoints[arch]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    text = "Hello, how are you? 12 §é ☃ \n\tdef f(): pass"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())  # trained: not byte by byte
    assert all(tokenizer.decode([index]) for index in range(len(tokenizer)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_conversation_is_marked_with_special_tokens(
    checkpoints: dict[str, Path], arch: str
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints[arch])
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    closed = tokenizer.apply_chat_template(chat, tokenize=False)
    opened = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert opened.startswith(closed)
    assert len(opened) > len(closed)
    end_of_turn = ARCHITECTURES[arch].chat.end_of_turn
    assert closed.count(end_of_turn) == len(chat)
    ids = tokenizer.encode(closed, add_special_tokens=False)
    assert ids.count(tokenizer.convert_tokens_to_ids(end_of_turn)) == len(chat)
    generation = json.loads((checkpoints[arch] / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids(end_of_turn) in generation["eos_token_id"]


def test_families_mark_conversations_differently(checkpoints: dict[str, Path]) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    formats = {
        transformers.AutoTokenizer.from_pretrained(path).apply_chat_template(chat, tokenize=False)
        for path in checkpoints.values()
    }
    assert len(formats) >= 5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_have_the_promised_size_and_are_safetensors(
    checkpoints: dict[str, Path], arch: str
) -> None:
    files = sorted(checkpoints[arch].iterdir())
    num_bytes = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    assert 5 << 20 <= num_bytes <= 10 << 20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".py")]


def test_a_seed_is_a_model(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    def weights(path: Path) -> bytes:
        return (path / "model.safetensors").read_bytes()

    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = write_tiny_model("llama", tmp_path / "again")
    other = write_tiny_model("llama", tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(again) == weights(checkpoints["llama"])
    assert weights(other) != weights(again)
    assert (again / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_the_larger_size_and_the_other_dtype(tmp_path: Path) -> None:
    path = write_tiny_model("qwen3-moe", tmp_path / "m", size="small", dtype="float16")
    assert 64 << 20 <= (path / "model.safetensors").stat().st_size <= 100 << 20
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == "float16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "lama"}, "unknown architecture 'lama'; expected one of: llama, smollm, mistral,"),
        ({"size": "8b", "arch": "gemma"}, "unknown size '8b' of gemma; expected one of: tiny, sm"),
        ({"quantize": "int5"}, "unknown format 'int5' of llama; expected one of: int4"),
        ({"quantize": "int4", "arch": "bert"}, "of a model that generates text"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; expected one of: bfloat16, float16, float32"),
    ],
)
def test_what_is_not_there_is_refused(
    tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_tiny_model(**{"arch": "llama", "out_dir": str(tmp_path / "m"), **arguments})
    assert not (tmp_path / "m").exists()


def test_four_bit_weights_are_those_of_the_seed_rounded(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    exact = load_file(checkpoints["llama"] / "model.safetensors")
    path = write_tiny_model("llama", tmp_path / "int4", quantize="int4")
    packed = load_file(path / "model.safetensors")
    stem = "model.layers.1.mlp.up_proj.weight"
    words = packed[f"{stem}_packed"].to(torch.int64)
    numbers = (words.unsqueeze(-1) >> torch.arange(8) * 4 & 15).flatten(1) - 8
    scale = packed[f"{stem}_scale"].float().repeat_interleave(32, dim=1)
    error = (numbers * scale - exact[stem].float()).abs()
    assert tuple(packed[f"{stem}_shape"]) == exact[stem].shape
    assert torch.all(error <= 0.55 * scale)
    assert torch.equal(packed["lm_head.weight"], exact["lm_head.weight"])


def test_an_adapter_has_both_halves_of_every_projection(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    path = write_tiny_adapter(checkpoints["llama"], tmp_path / "adapter", rank=4)
    tensors = load_file(path / "adapter_model.safetensors")
    assert len(tensors) == 4 * 7 * 2  # layers, projections, halves
    layer = "base_model.model.model.layers.0.mlp.down_proj"
    assert tensors[f"{layer}.lora_A.weight"].shape == (4, 768)
    assert tensors[f"{layer}.lora_B.weight"].shape == (256, 4)
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 4


def test_files_of_others_are_not_overwritten_by_accident(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is not an empty directory"):
        write_tiny_model("llama", tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_text("stale")
    write_tiny_model("llama", tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


PROGRAM = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=32 << 20)
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    output = llm.chat(chat, sampling, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 16 and len(set(output.token_ids)) > 4, output
    assert output.text, output
"""


@pytest.mark.vllm
@pytest.mark.parametrize("arch", ["mistral", "phi3"])  # the others are run by tests/e2e
def test_vllm_serves_it(checkpoints: dict[str, Path], tmp_path: Path, arch: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    done = subprocess.run(
        [sys.executable, str(program), str(checkpoints[arch])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
