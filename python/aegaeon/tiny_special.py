"""Random checkpoints that are no plain text generators: images, 4-bit weights, LoRA adapters.

Like `tiny_model`, which writes the rest of them, this imports torch and transformers when called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, ProcessorMixin

IMAGE_PIXELS = 56
PATCH_PIXELS = 14
# What an image becomes, in tokens of the text model.
IMAGE_TOKENS = 8
INT4_GROUP = 32


# ---- images ------------------------------------------------------------------------------------


def processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """What turns images into the model's inputs. Adds the image's token to `tokenizer`."""
    from transformers import Blip2Processor, BlipImageProcessorPil

    images = BlipImageProcessorPil(size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS})
    return Blip2Processor(images, tokenizer, num_query_tokens=IMAGE_TOKENS)


def seeing_options(text: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The configuration of a model that sees, from that of the Llama in it."""
    common = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    return {
        "text_config": {
            **text,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(tokenizer),
        },
        "vision_config": {
            **common,
            "num_hidden_layers": 2,
            "image_size": IMAGE_PIXELS,
            "patch_size": PATCH_PIXELS,
        },
        "qformer_config": {**common, "num_hidden_layers": 2, "vocab_size": 64},
        "num_query_tokens": IMAGE_TOKENS,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        **{name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


# ---- 4-bit weights -----------------------------------------------------------------------------


def quantize_int4(path: Path) -> None:
    """Rewrite the checkpoint at `path`: its layers' matrices as 4-bit integers, in groups of 32.

    The format is `pack-quantized` of compressed-tensors, which vLLM loads on GPUs and CPUs.
    """
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        if weight.dim() == 2 and ".layers." in name and not name.endswith("norm.weight"):
            stem = name.removesuffix("weight")
            for part, value in _int4(weight).items():
                tensors[stem + part] = value
        else:
            tensors[name] = weight
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": INT4_GROUP,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))


def _int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """-8 to 7 times a scale per group of inputs; eight numbers in a 32-bit word, lowest first."""
    import torch

    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, INT4_GROUP)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7.5).clamp(min=1e-8).to(weight.dtype)
    numbers = (groups / scale.float()).round().clamp(-8, 7).view(rows, columns).to(torch.int64) + 8
    shifts = torch.arange(8) * 4
    words = (numbers.view(rows, -1, 8) << shifts).sum(dim=-1)
    return {
        "weight_packed": words.to(torch.uint32).view(torch.int32),
        "weight_scale": scale.squeeze(-1).contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


# ---- adapters ----------------------------------------------------------------------------------

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_tiny_adapter(
    model_dir: str | Path, out_dir: str | Path, *, seed: int = 0, rank: int = 8
) -> Path:
    """Write a random LoRA adapter of the checkpoint at `model_dir` to `out_dir`; its path.

    In PEFT's format, for all projections of all layers, strong enough to change what is said.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = Path(out_dir)
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(Path(model_dir) / "model.safetensors", framework="pt") as checkpoint:
        for name in sorted(checkpoint.keys()):
            stem = name.removesuffix(".weight")
            if stem.rpartition(".")[2] not in ADAPTED:
                continue
            weight = checkpoint.get_tensor(name)
            rows, columns = weight.shape
            down = torch.randn(rank, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, rank, generator=generator) / rank**0.5
            tensors[f"base_model.model.{stem}.lora_A.weight"] = down.to(weight.dtype)
            tensors[f"base_model.model.{stem}.lora_B.weight"] = (up / 2).to(weight.dtype)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_dir),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ADAPTED),
    }
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    return path
