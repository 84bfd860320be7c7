"""Random checkpoints with real tokenizers and chat templates, for demos, tests and benchmarks.

What is written loads like any published model: safetensors, configuration, generation settings, a
byte-level BPE tokenizer that was really trained, and the chat format of its family. The weights are
scaled so that what the model says depends on what it read: attention is peaked, no layer drowns the
others, and the output rows are of unequal length, so that two tokens seldom tie in 16 bits. Imports
torch and transformers when called, not before.

What is no plain text generator (an embedding model, one that sees images, 4-bit weights, a LoRA
adapter) is in `tiny_special`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegaeon import tiny_special

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = ("bfloat16", "float16", "float32")
QUANTIZATIONS = ("int4",)


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model, under the names that every configuration class shares."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False


TINY = Shape(256, 768, 4, 4, 2, 64, vocab_size=1024, max_position_embeddings=4096)
SMALL = Shape(512, 2048, 11, 8, 4, 64, vocab_size=1024, max_position_embeddings=4096)


@dataclass(frozen=True)
class ChatFormat:
    """How a family marks the turns of a conversation: `before`, the text, `after`."""

    bos: str | None
    eos: str
    end_of_turn: str
    before: str
    after: str
    marks: tuple[str, ...] = ()
    assistant: str = "assistant"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        first = () if self.bos is None else (self.bos,)
        return tuple(dict.fromkeys((*first, self.eos, self.end_of_turn, *self.marks)))

    @property
    def template(self) -> str:
        """The Jinja template; a conversation starts with the beginning-of-text token if there is
        one.
        """
        role = "m['role']"
        if self.assistant != "assistant":
            role = f"('{self.assistant}' if {role} == 'assistant' else {role})"
        before = self.before.replace("ROLE", f"{{{{ {role} }}}}")
        prompt = self.before.replace("ROLE", self.assistant)
        return (
            f"{self.bos or ''}{{% for m in messages %}}{before}{{{{ m['content'] }}}}{self.after}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
        )


CHATML = ChatFormat(
    bos=None,
    eos="<|endoftext|>",
    end_of_turn="<|im_end|>",
    marks=("<|im_start|>",),
    before="<|im_start|>ROLE\n",
    after="<|im_end|>\n",
)
LLAMA3 = ChatFormat(
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    end_of_turn="<|eot_id|>",
    marks=("<|start_header_id|>", "<|end_header_id|>"),
    before="<|start_header_id|>ROLE<|end_header_id|>\n\n",
    after="<|eot_id|>",
)
GEMMA = ChatFormat(
    bos="<bos>",
    eos="<eos>",
    end_of_turn="<end_of_turn>",
    marks=("<start_of_turn>",),
    before="<start_of_turn>ROLE\n",
    after="<end_of_turn>\n",
    assistant="model",
)
MISTRAL = ChatFormat(
    bos="<s>",
    eos="</s>",
    end_of_turn="[/TURN]",
    marks=("[TURN]",),
    before="[TURN] ROLE: ",
    after="[/TURN]",
)
PHI3 = ChatFormat(
    bos=None,
    eos="<|endoftext|>",
    end_of_turn="<|end|>",
    marks=("<|user|>", "<|assistant|>", "<|system|>"),
    before="<|ROLE|>\n",
    after="<|end|>\n",
)


@dataclass(frozen=True)
class Architecture:
    """A family: its configuration class, its chat format, and what is particular about it.

    task: generate, embed (one vector per text) or see (text about an image).
    """

    config_class: str
    chat: ChatFormat
    options: Callable[[Shape], Mapping[str, Any]] = lambda shape: {}
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    task: str = "generate"


def _llama_shape(hidden: int, intermediate: int, layers: int, *, tied: bool) -> Shape:
    head_dim = 64 if tied else 128
    return Shape(hidden, intermediate, layers, 32, 8, head_dim, 128256, 131072, tied)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "LlamaConfig",
        LLAMA3,
        shapes={
            "1b": _llama_shape(2048, 8192, 16, tied=True),  # Llama 3.2 1B
            "8b": _llama_shape(4096, 14336, 32, tied=False),  # Llama 3.1 8B
        },
    ),
    "smollm": Architecture("LlamaConfig", CHATML, lambda shape: {"tie_word_embeddings": True}),
    "mistral": Architecture("MistralConfig", MISTRAL, lambda shape: {"sliding_window": None}),
    "mistral_window": Architecture("MistralConfig", MISTRAL, lambda shape: {"sliding_window": 64}),
    "qwen2": Architecture("Qwen2Config", CHATML),
    "qwen3": Architecture(
        "Qwen3Config",
        CHATML,
        shapes={
            "1b": Shape(2048, 6144, 28, 16, 8, 128, 151936, 40960, True),  # Qwen3 1.7B
            "8b": Shape(4096, 12288, 36, 32, 8, 128, 151936, 40960),  # Qwen3 8B
        },
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeConfig",
        CHATML,
        lambda shape: {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": shape.intermediate_size // 8,
        },
    ),
    "gemma": Architecture(
        "GemmaConfig", GEMMA, lambda shape: {"hidden_activation": "gelu_pytorch_tanh"}
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        GEMMA,
        lambda shape: {
            "sliding_window": 128,
            "query_pre_attn_scalar": shape.head_dim,
            "layer_types": [
                ("sliding_attention", "full_attention")[i % 2]
                for i in range(shape.num_hidden_layers)
            ],
        },
    ),
    "phi3": Architecture(
        "Phi3Config",
        PHI3,
        lambda shape: {"original_max_position_embeddings": shape.max_position_embeddings},
    ),
    "bert": Architecture("BertConfig", CHATML, task="embed"),
    "blip2": Architecture("Blip2Config", LLAMA3, task="see"),
}


def write_tiny_model(
    arch: str,
    out_dir: str | Path,
    *,
    seed: int = 0,
    size: str = "tiny",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a random checkpoint to `out_dir` and return its path.

    arch:  a key of ARCHITECTURES ('-' reads as '_').
    size:  'tiny' (5 to 10 MiB of weights in 16 bits) or 'small' (64 to 100 MiB); for some
           families also '1b' and '8b', the dimensions of a published model, vocabulary included.
    dtype: one of DTYPES.
    quantize: one of QUANTIZATIONS: the linear layers' weights in that format; of text generators.

    The same arguments give the same weights on the same version of torch. Raises ValueError for an
    unknown architecture, size, dtype or format, and for an `out_dir` that is not empty unless
    `overwrite`.
    """
    name = arch.replace("-", "_")
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; expected one of: {_list(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    shapes = {"tiny": TINY, "small": SMALL, **architecture.shapes}
    if size not in shapes:
        raise ValueError(f"unknown size {size!r} of {name}; expected one of: {_list(shapes)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; expected one of: {_list(DTYPES)}")
    if quantize is not None and (quantize not in QUANTIZATIONS or architecture.task != "generate"):
        raise ValueError(
            f"unknown format {quantize!r} of {name}; expected one of: {_list(QUANTIZATIONS)}, "
            f"of a model that generates text"
        )
    path = Path(out_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
        raise ValueError(f"{path} is not an empty directory; choose another or ask to overwrite")

    path.mkdir(parents=True, exist_ok=True)
    for stale in path.glob("*.safetensors*"):
        stale.unlink()
    tokenizer = _train_tokenizer(architecture.chat, shapes[size].vocab_size)
    if architecture.task == "see":
        tiny_special.processor(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    model = _build_model(architecture, shapes[size], tokenizer, dtype=dtype, seed=seed)
    with _without_progress_bar():
        model.save_pretrained(path)
    if quantize == "int4":
        tiny_special.quantize_int4(path)
    return path


def _list(names: Mapping[str, Any] | tuple[str, ...]) -> str:
    return ", ".join(names)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ---- weights -----------------------------------------------------------------------------------


def _build_model(
    architecture: Architecture,
    shape: Shape,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: str,
    seed: int,
) -> PreTrainedModel:
    import torch
    import transformers

    options: dict[str, Any] = {**vars(shape), **architecture.options(shape)}
    options["bos_token_id"] = tokenizer.bos_token_id
    options["eos_token_id"] = tokenizer.eos_token_id
    options["pad_token_id"] = tokenizer.eos_token_id
    make: Any = transformers.AutoModelForCausalLM
    if architecture.task == "embed":
        make = transformers.AutoModel
    elif architecture.task == "see":
        make = transformers.AutoModelForImageTextToText
        options = tiny_special.seeing_options(options, tokenizer)
    config = getattr(transformers, architecture.config_class)(**options)
    with torch.random.fork_rng(devices=[]):
        model = make.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    _fill(model, generator, num_special_tokens=len(architecture.chat.special_tokens))
    end_of_turn = tokenizer.convert_tokens_to_ids(architecture.chat.end_of_turn)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys((tokenizer.eos_token_id, end_of_turn))),
        pad_token_id=tokenizer.eos_token_id,
    )
    return model


def _fill(model: PreTrainedModel, generator: torch.Generator, *, num_special_tokens: int) -> None:
    """Draw every matrix anew; vectors (norms, biases) keep the neutral values of their class."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            if parameter.dim() < 2:
                if kind in ("q_norm", "k_norm"):
                    parameter.add_(0.8)
                continue
            fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
            parameter.normal_(0.0, _std(kind, model, fan_in), generator=generator)
            if kind == "lm_head":
                spread = torch.empty(parameter.shape[0], 1).normal_(0.0, 0.4, generator=generator)
                spread[:num_special_tokens] = math.log(0.3)  # answers seldom end by themselves
                parameter.mul_(spread.exp())


def _std(kind: str, model: PreTrainedModel, fan_in: int) -> float:
    unit = 1 / math.sqrt(fan_in)  # a unit-variance input gives a unit-variance output
    if kind == "embed_tokens":
        # Gemma multiplies embeddings by sqrt(hidden_size); a tied output layer must stay moderate.
        text = model.config.get_text_config()
        return unit if text.model_type.startswith("gemma") or text.tie_word_embeddings else 1.0
    return {"lm_head": 3.0, "q_proj": 1.8, "k_proj": 1.8, "qkv_proj": 1.5}.get(kind, 1.0) * unit


# ---- tokenizer ---------------------------------------------------------------------------------

_TEXT = """
A switch of models moves bytes between the host and the device while requests stay open. Every
model has an address range of its own; what changes is the memory behind it. When the turn of a
model ends, its weights may go, because the host keeps an image of them, and its cache of keys and
values is copied out, since nobody else has it. When the turn comes again, the same bytes return
to the same place, and the next token is the one that would have come without the switch. Hello,
how are you today? I am fine, thank you. Please write a short story about a ship that sails around
the world and finds an island where it always rains. Why is the sky blue? Explain in three
sentences, as if to a child, what a computer does when it reads a file. The quick brown fox jumps
over the lazy dog; 0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000. def add(a, b): return a + b # numbers,
not strings. for i in range(10): print(i, end=" "). You are a helpful assistant. user assistant
system model. What is the capital of France? List five colours: red, green, yellow, black and
white. In the morning people drink coffee or tea, eat bread with butter, and read the news before
they leave the house. Summer follows spring, winter follows autumn; rivers flow to the sea,
mountains stand, and the stars turn slowly above both. Many small machines, each with little
memory, can do together what one large machine cannot do alone, provided that they agree on the
order.
"""


def _train_tokenizer(chat: ChatFormat, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a fixed text, filled up to `vocab_size` with words no merge leads to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 1024),
        min_frequency=1,
        special_tokens=list(chat.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_TEXT.split("\n"), trainer)

    vocab = trained.get_vocab()
    for index in range(len(vocab), vocab_size):
        vocab[f"Ġword{index}"] = index
    merges = _merges_of(trained)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(chat.special_tokens))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chat.bos,
        eos_token=chat.eos,
        pad_token=chat.eos,
        additional_special_tokens=[
            token for token in chat.special_tokens if token not in (chat.bos, chat.eos)
        ],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat.template
    return fast


def _merges_of(tokenizer: Any) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
