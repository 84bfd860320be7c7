"""From one model of the pool file to vLLM's own arguments and configuration.

The front and the instance each build the configuration from the same arguments, so nothing of
vLLM's has to travel between them.
"""

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NoReturn

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from aegaeon.core.config import ModelConfig
from aegaeon.core.errors import ConfigError, ModelLoadError
from aegaeon.vllm_plugin.executor import HostedExecutor

# What switching cannot do yet; refused with the reason instead of failing later.
REFUSED_OPTIONS: Mapping[str, str] = {
    "tensor_parallel_size": "models on several devices are not hosted yet",
    "pipeline_parallel_size": "models on several devices are not hosted yet",
    "data_parallel_size": "replicas of one model are not hosted yet",
    "speculative_config": "speculative decoding is not switched yet",
    "kv_transfer_config": "KV connectors are one per process and cannot be switched",
    "enable_sleep_mode": "the arena replaces vLLM's sleep mode",
    "load_format": "weights come from safetensors files only",
    "kv_offloading_size": "KV connectors are one per process and cannot be switched",
    "ec_transfer_config": "encoder connectors are one per process and cannot be switched",
    "cpu_offload_gb": "the arena decides where weights are",
    "config": "a pool file names every option itself",
    "middleware": "no code from outside is loaded",
    "tool_parser_plugin": "no code from outside is loaded",
    "reasoning_parser_plugin": "no code from outside is loaded",
    "logits_processors": "no code from outside is loaded",
    "io_processor_plugin": "no code from outside is loaded",
}


WORKERS = {
    "host": "aegaeon.vllm_plugin.cpu_worker.ArenaCPUWorker",
    "cuda": "aegaeon.vllm_plugin.worker.ArenaWorker",
}


def serve_args(model: ModelConfig, *, device_kind: str) -> Namespace:
    """vLLM's own parsed `vllm serve` arguments for `model` on a device of `device_kind`.

    device_kind: host or cuda. An option has to be spelled in full: vLLM's parser would also take
    beginnings of names, and names with dots for parts of an option, past what is refused here.

    Raises ConfigError, naming the model, for an option that vLLM does not know or we refuse.
    """
    options: dict[str, Any] = {
        "disable_uvicorn_access_log": True,
        "enable_request_id_headers": True,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "kv_cache_memory_bytes": model.kv_memory,
    }
    if model.max_model_len is not None:
        options["max_model_len"] = model.max_model_len
    if device_kind == "host":
        # Compiling takes longer than everything else on a CPU; a pool may turn it on again.
        options["enforce_eager"] = True
    for key, value in model.vllm.items():
        option = key.replace("-", "_")
        if not option.isidentifier():
            raise ConfigError(
                f"model {model.name!r}: vllm.{key}: expected the plain name of an option; parts of "
                f"one are given as a mapping"
            )
        reason = REFUSED_OPTIONS.get(option) or _refusal(option, value, device_kind)
        if reason is not None:
            raise ConfigError(f"model {model.name!r}: vllm.{key}: {reason}")
        options[option] = value
    parser = make_arg_parser(_RaisingParser(model.name))
    namespace = parser.parse_args(
        ["--model", model.model, "--served-model-name", *model.names, *_as_flags(options)]
    )
    validate_parsed_serve_args(namespace)
    return namespace


def _refusal(option: str, value: Any, device_kind: str) -> str | None:
    """Why an option cannot have this value, or not on this kind of device."""
    if option in ("enable_lora", "lora_modules") and value and device_kind != "host":
        # Their slots are outside the arena, where a GPU's memory would not be accounted for.
        return "LoRA adapters are not switched on this device yet"
    return None


def engine_config(namespace: Namespace, *, model: str, device_kind: str) -> VllmConfig:
    """The engine configuration of a hosted model, from its parsed arguments.

    Raises ModelLoadError when vLLM refuses the checkpoint or a combination of options.
    """
    engine_args = AsyncEngineArgs.from_cli_args(namespace)
    engine_args.distributed_executor_backend = HostedExecutor
    engine_args.worker_cls = WORKERS[device_kind]
    # A batch in flight would keep a model from being switched away after its step.
    engine_args.async_scheduling = False
    try:
        return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except (ValueError, OSError, KeyError) as error:
        raise ModelLoadError(model, str(error)) from error


class _RaisingParser(FlexibleArgumentParser):
    """vLLM's parser, with an exception in place of `sys.exit`."""

    def __init__(self, model: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._model = model

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"model {self._model!r}: vllm: {message}")


def _as_flags(options: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for option, value in options.items():
        flag = "--" + option.replace("_", "-")
        match value:
            case True:
                flags.append(flag)
            case False:
                flags.append("--no-" + flag.removeprefix("--"))
            case None:
                continue
            case dict():
                flags += [flag, json.dumps(value)]
            case list() | tuple():
                flags += [flag, *(_as_text(item) for item in value)]
            case _:
                flags += [flag, str(value)]
    return flags


def _as_text(item: Any) -> str:
    return json.dumps(item) if isinstance(item, Mapping) else str(item)
