"""`pool.yaml`: which models share a device, and under what rules.

Parsed once and strictly. Whatever is wrong is reported together, each fault with its line, its key,
the value found and the form that is accepted. Knows nothing of vLLM's own options beyond those that
the pool decides itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from . import envs
from .errors import ConfigError
from .units import (
    DURATION_FORM,
    KEEP_ALIVE_FORM,
    SIZE_FORM,
    SIZE_OR_SHARE_FORM,
    MemoryBudget,
    format_bytes,
    parse_bytes,
    parse_duration,
    parse_keep_alive,
)
from .yaml_source import KeyPath, YamlSource, read_yaml, spell

__all__ = [
    "POLICIES",
    "AdminConfig",
    "Defaults",
    "MemoryBudget",
    "ModelConfig",
    "PoolConfig",
    "SchedulerConfig",
    "ServerConfig",
    "Slo",
    "Strict",
    "SupervisionConfig",
    "format_bytes",
    "json_schema",
    "load_pool",
    "parse_bytes",
    "parse_duration",
    "validated",
    "with_model",
]

POLICIES = ("round-robin", "fcfs", "paper", "request-level", "slack")

# vLLM's options that the pool decides: key -> where to say it instead (None: it has no place).
OWNED_VLLM_OPTIONS: Mapping[str, str | None] = {
    "model": "`model`",
    "served_model_name": "`name` and `aliases`",
    "max_model_len": "`max_model_len`",
    "gpu_memory_utilization": "`device_memory` of the pool",
    "kv_cache_memory_bytes": "`kv_memory`",
    "num_gpu_blocks_override": "`kv_memory`",
    "host": "`server.host`",
    "port": "`server.port`",
    "api_key": "`server.api_keys_file`",
    "worker_cls": None,
    "worker_extension_cls": None,
    "distributed_executor_backend": None,
    "scheduler_cls": None,
    "async_scheduling": None,
    "trust_remote_code": None,
}

_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
_MAX_NAME_CHARS = 128
_MAX_SOCKET_PATH_BYTES = 107

_SIZE_SCHEMA = {"type": ["integer", "string"], "description": SIZE_FORM}
Size = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema(_SIZE_SCHEMA)]
DeviceMemory = Annotated[
    MemoryBudget,
    BeforeValidator(lambda v: v if isinstance(v, MemoryBudget) else MemoryBudget.parse(v)),
    PlainSerializer(str, when_used="json"),
    WithJsonSchema({"type": ["integer", "string"], "description": SIZE_OR_SHARE_FORM}),
]
KeepAlive = Annotated[
    float | None,
    BeforeValidator(parse_keep_alive),
    PlainSerializer(lambda seconds: -1 if seconds is None else seconds, when_used="json"),
    WithJsonSchema({"type": ["number", "string"], "description": KEEP_ALIVE_FORM}),
]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    Field(gt=0),
    WithJsonSchema({"type": ["number", "string"], "description": DURATION_FORM}),
]
S = TypeVar("S", bound=BaseModel)
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000)]
MaxModelLen = Annotated[int | None, Field(ge=1)]


class Strict(BaseModel):
    """Settings as they are read from a file: no coercion, no unknown keys, never changed."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )


class Slo(Strict):
    """When a token counts as on time. Round robin does not act on it."""

    ttft_ms: Milliseconds = 10_000.0
    """Time to the first token, in milliseconds."""
    tpot_ms: Milliseconds = 100.0
    """Time per output token after the first, in milliseconds."""


class Defaults(Strict):
    """What a model gets when it does not say otherwise."""

    slo: Slo = Slo()
    max_model_len: MaxModelLen = None
    """Longest prompt plus answer, in tokens; null: the model's own limit."""
    keep_alive: KeepAlive = 600.0
    """How long an idle model is kept on the device while nobody else needs the room. 0: it leaves
    when its requests have ended; -1: it stays until somebody needs the room.
    """
    kv_memory: Size = 64 << 20
    """KV cache of one model: the range it may fill when resident."""


class ModelConfig(Defaults):
    """One model of the pool. What it does not say has been taken from the pool's `defaults`."""

    model: str = Field(min_length=1)
    """A directory with the checkpoint (a relative one starts at the pool file), or a name in the
    local hub cache.
    """
    name: str = ""
    """The name clients ask for; by default the last part of `model`."""
    aliases: tuple[str, ...] = Field(default=(), strict=False)
    """Further names for the same model."""
    pin: bool = False
    """Never leaves the device."""
    priority: int = 0
    """Lower runs earlier. Only `slack` acts on it."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM's engine arguments as it is."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.aliases)

    @model_validator(mode="before")
    @classmethod
    def _name_after_the_checkpoint(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("model"), str) and "name" not in data:
            return {**data, "name": Path(data["model"]).name}
        return data

    @field_validator("name", "aliases")
    @classmethod
    def _can_be_asked_for(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if not _SERVED_NAME.fullmatch(name) or len(name) > _MAX_NAME_CHARS:
                raise ValueError(
                    f"expected letters, digits and . _ : / -, starting with a letter or digit, "
                    f"at most {_MAX_NAME_CHARS}"
                )
        return value

    @field_validator("vllm")
    @classmethod
    def _leaves_the_pools_decisions_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            option = key.replace("-", "_").lstrip("_")
            if option in OWNED_VLLM_OPTIONS:
                instead = OWNED_VLLM_OPTIONS[option]
                reason = f"use {instead}" if instead else "it would break switching or safety"
                raise _fault(f"this option of vLLM is not accepted here; {reason}", key)
        return value


class SchedulerConfig(Strict):
    """Which model runs next, and for how long."""

    policy: str = Field(default="round-robin", json_schema_extra={"enum": list(POLICIES)})
    quantum: int = Field(default=8, ge=1)
    """Most engine steps of one model before another one with work has its turn."""
    admission: Literal["none", "deadline"] = "none"
    """deadline: a request whose first token is not expected in time is answered 429 at once, with a
    `Retry-After` by the queue. none: all are let in.
    """

    @field_validator("policy")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"expected one of: {', '.join(POLICIES)}")
        return value


class ServerConfig(Strict):
    """The HTTP front."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free port, printed at the start."""
    api_keys_file: str | None = None
    """Hashes of the keys that are let in, as `aegaeon key` writes them; read again when it changes.
    null: no key is asked for, which only a loopback address may do. A relative path starts at the
    pool file.
    """
    max_queued_requests: int = Field(default=256, ge=1)
    """Open requests per model beyond which new ones are answered 429."""
    max_open_requests: int = Field(default=2048, ge=1)
    """Open requests of all models together beyond which new ones are answered 503."""
    max_n: int = Field(default=8, ge=1)
    """Most answers that one request may ask for, with `n` or `best_of`."""
    max_body_bytes: Size = 16 << 20
    """Longest request body."""
    drain_timeout: Duration = 30.0
    """After SIGTERM new requests are refused, and open ones may go on for this long."""


class SupervisionConfig(Strict):
    """What is done when the instance, the process with all models, dies or does not get on."""

    stalled_after: Duration = 8.0
    """`/health` turns 503 when the instance has not answered, or the step loop has achieved nothing
    in spite of open requests, for this long."""
    restart_after: KeepAlive = 120.0
    """An instance that is stalled for this long is killed and started anew; -1: never."""
    max_restarts: int = Field(default=5, ge=0)
    """Restarts within `restart_window` after which the server ends instead."""
    restart_window: Duration = 600.0
    start_timeout: Duration = 1800.0
    """A new instance that has not loaded all models by then counts as one that died."""


class AdminConfig(Strict):
    """The listener for admin verbs, apart from the public one."""

    socket: str = Field(default="auto", min_length=1)
    """Path of a unix socket (created with mode 0600), or `auto`: one in a private temporary
    directory.
    """
    port: int | None = Field(default=None, ge=1, le=65535)
    """A port on the loopback address beside the socket, for tools that cannot use one. Needs
    `keys_file`.
    """
    keys_file: str | None = None
    """Hashes of the keys that are let in on `port`, in the form of `server.api_keys_file`. The
    socket asks for none: its file is this user's alone.
    """

    @model_validator(mode="after")
    def _no_port_without_keys(self) -> Self:
        if self.port is not None and self.keys_file is None:
            raise _fault("a port needs admin.keys_file; `aegaeon key FILE` makes one", "port")
        return self

    @field_validator("socket")
    @classmethod
    def _fits_the_kernels_limit(cls, value: str) -> str:
        if len(value.encode()) > _MAX_SOCKET_PATH_BYTES:
            raise ValueError(f"expected a path of at most {_MAX_SOCKET_PATH_BYTES} bytes")
        return value


class ImageCacheConfig(Strict):
    """Weights images on disk: a restart reads them instead of loading checkpoints again."""

    directory: str | None = Field(default=None, min_length=1)
    """Where they are kept; `auto`: `aegaeon` in this user's cache directory. A relative path starts
    at the pool file. null: none are kept.
    """
    max_size: Size = 200 << 30
    """Most bytes in that directory; images that were not used for longest are removed."""


class ObservabilityConfig(Strict):
    """What is told of requests beside the metrics. Never what was said in them."""

    log_requests: bool = False
    """One log line per request, with its id, model, status and times. Answers with a status of 500
    and above are logged in any case.
    """
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s/]+(/\S*)?$")
    """Base address of an OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318;
    null: no traces are made, and nothing is sent anywhere.
    """
    trace_sample: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the requests that are traced, of those whose client does not say so itself."""


class PoolConfig(Strict):
    """A pool: models that share a device, and the server in front of them."""

    device: str = Field(default="auto", pattern=r"^(auto|host|cuda(:\d+)?)$")
    """auto (a GPU when there is one), host, cuda or cuda:N."""
    device_memory: DeviceMemory = MemoryBudget(share=0.9)
    """What the arena may hold: weights and KV cache of the models that are resident."""
    host_memory: Size = 64 << 30
    """Most bytes of host images and swapped KV."""
    host_kv_memory: Size | None = None
    """Of `host_memory`: where KV cache blocks of models that are not on the device are kept. null:
    as much as the KV caches of all models together, or what the weights leave if that is less.
    """
    defaults: Defaults = Defaults()
    models: tuple[ModelConfig, ...] = Field(strict=False)
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()
    admin: AdminConfig = AdminConfig()
    image_cache: ImageCacheConfig = ImageCacheConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    def model(self, name: str) -> ModelConfig | None:
        """The model with that name or alias."""
        return next((model for model in self.models if name in model.names), None)

    @model_validator(mode="before")
    @classmethod
    def _models_inherit_the_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("models"), list | tuple):
            return data
        try:
            Defaults.model_validate(data.get("defaults", {}))
        except ValidationError:
            return data  # reported once, where it stands, and not again for every model
        return {
            **data,
            "models": [_inherit(model, data.get("defaults")) for model in data["models"]],
        }

    @model_validator(mode="after")
    def _has_models_with_names_of_their_own(self) -> Self:
        if not self.models:
            raise _fault("the pool has no models; expected at least one", "models")
        owners: dict[str, int] = {}
        for index, model in enumerate(self.models):
            for name in model.names:
                if name in owners:
                    raise _fault(
                        f"the name {name!r} is already taken by models[{owners[name]}]; "
                        f"expected a `name` and `aliases` of its own",
                        "models",
                        index,
                    )
                owners[name] = index
        return self


def load_pool(path: str | Path) -> PoolConfig:
    """Read and check a pool file; relative paths in it start at its folder.

    Raises ConfigError that lists every fault found, one a line: file, line, key, value found,
    accepted form.
    """
    source = read_yaml(Path(path))
    return _with_absolute_paths(validated(source, PoolConfig), source)


def validated(source: YamlSource, settings: type[S]) -> S:
    """The document as `settings`. Raises ConfigError that lists every fault found, one a line."""
    if not isinstance(source.data, dict):
        found = "nothing" if source.data is None else f"a {type(source.data).__name__}"
        raise ConfigError(
            f"{source.where(())}: got {found}; expected a mapping with at least the key 'models'"
        )
    try:
        return settings.model_validate(source.data)
    except ValidationError as error:
        faults = [_describe(fault, source, settings) for fault in error.errors(include_url=False)]
        raise ConfigError("\n".join(faults)) from None


def with_model(pool: PoolConfig, entry: Mapping[str, Any]) -> PoolConfig:
    """`pool` with one more model, the last; `entry` is as in the pool file, its paths absolute.

    Raises ConfigError with every fault of the entry.
    """
    inherited = _inherit(dict(entry), pool.defaults.model_dump(mode="json", exclude_unset=True))
    try:
        model = ModelConfig.model_validate(inherited)
        found = _find_checkpoint(model.model, Path("/"))
        if found is None:
            raise ConfigError(
                f"model: got {model.model!r}; expected an absolute path of a directory with a "
                f"checkpoint, or a model in the local hub cache ({envs.hub_cache_dir()})"
            )
        models = (*pool.models, model.model_copy(update={"model": found}))
        # Names are compared among all models.
        PoolConfig.model_validate({"models": models})
    except ValidationError as error:
        faults = [
            f"{spell(_key_path(fault))}: {_what_is_wrong(fault, ModelConfig)}"
            for fault in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join(faults)) from None
    return pool.model_copy(update={"models": models})


def json_schema() -> dict[str, Any]:
    """The JSON schema of a pool file, for editors and `aegaeon config-schema`."""
    schema = PoolConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _inherit(model: Any, defaults: Any) -> Any:
    if not isinstance(model, dict) or not isinstance(defaults, dict):
        return model
    merged = {**defaults, **model}
    if isinstance(defaults.get("slo"), dict) and isinstance(model.get("slo"), dict):
        merged["slo"] = {**defaults["slo"], **model["slo"]}
    return merged


# ---- paths -------------------------------------------------------------------------------------


def _with_absolute_paths(pool: PoolConfig, source: YamlSource) -> PoolConfig:
    folder = source.path.absolute().parent
    faults: list[str] = []
    models = []
    key_path: KeyPath
    for index, model in enumerate(pool.models):
        found = _find_checkpoint(model.model, folder)
        if found is None:
            key_path = ("models", index, "model")
            faults.append(
                f"{source.where(key_path)}: {spell(key_path)}: got {model.model!r}; expected a "
                f"directory with a checkpoint ({folder / Path(model.model).expanduser()} does not "
                f"exist) or a model in the local hub cache ({envs.hub_cache_dir()})"
            )
        else:
            models.append(model.model_copy(update={"model": found}))
    server, admin = pool.server, pool.admin
    files: dict[KeyPath, str | None] = {
        ("server", "api_keys_file"): server.api_keys_file,
        ("admin", "keys_file"): admin.keys_file,
    }
    for key_path, name in files.items():
        if name is None:
            continue
        keys = folder / Path(name).expanduser()
        if not keys.is_file():
            faults.append(
                f"{source.where(key_path)}: {spell(key_path)}: got {name!r}; expected a file of "
                f"keys, as `aegaeon key FILE` makes it ({keys} does not exist)"
            )
        files[key_path] = str(keys)
    server = server.model_copy(update={"api_keys_file": files["server", "api_keys_file"]})
    admin = admin.model_copy(update={"keys_file": files["admin", "keys_file"]})
    if admin.socket != "auto":
        socket = folder / Path(admin.socket).expanduser()
        admin = admin.model_copy(update={"socket": AdminConfig(socket=str(socket)).socket})
    cache = pool.image_cache
    if cache.directory is not None:
        directory = envs.cache_dir() / "aegaeon"
        if cache.directory != "auto":
            directory = folder / Path(cache.directory).expanduser()
        cache = cache.model_copy(update={"directory": str(directory)})
    if faults:
        raise ConfigError("\n".join(faults))
    changes = {"models": tuple(models), "server": server, "admin": admin, "image_cache": cache}
    return pool.model_copy(update=changes)


def _find_checkpoint(model: str, folder: Path) -> str | None:
    """The path when it is one, or the name as it is when the local hub cache has it."""
    path = folder / Path(model).expanduser()
    if path.exists():
        return str(path)
    cached = envs.hub_cache_dir() / f"models--{model.replace('/', '--')}"
    looks_like_a_name = model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    return model if looks_like_a_name and cached.is_dir() else None


# ---- messages ----------------------------------------------------------------------------------


def _fault(message: str, *key_path: str | int) -> PydanticCustomError:
    """An error whose message says all, about a key below the place where it is raised."""
    return PydanticCustomError("fault", "{message}", {"message": message, "key_path": key_path})


def _describe(fault: ErrorDetails, source: YamlSource, root: type[BaseModel]) -> str:
    key_path = _key_path(fault)
    return f"{source.where(key_path)}: {spell(key_path)}: {_what_is_wrong(fault, root)}"


def _key_path(fault: ErrorDetails) -> KeyPath:
    return (*fault["loc"], *fault.get("ctx", {}).get("key_path", ()))


def _what_is_wrong(fault: ErrorDetails, root: type[BaseModel]) -> str:
    *parents, key = _key_path(fault)
    match fault["type"]:
        case "fault":
            return fault["msg"]
        case "extra_forbidden":
            return f"unknown key; {_suggest(str(key), _valid_keys(tuple(parents), root))}"
        case "missing":
            return "the key is required and missing"
    return f"got {_show(fault['input'])}; {_accepted_form(fault)}"


def _accepted_form(fault: ErrorDetails) -> str:
    context = fault.get("ctx", {})
    match fault["type"]:
        case "value_error":
            return str(context["error"])
        case "bool_type":
            return "expected true or false"
        case "int_type" | "int_from_float":
            return "expected a whole number"
        case "float_type":
            return "expected a number"
        case "string_type":
            return "expected text (put it in quotes)"
        case "string_too_short":
            return "expected text that is not empty"
        case "string_pattern_mismatch":
            return "expected auto, host, cuda or cuda:N"
        case "model_type" | "dict_type":
            return "expected a mapping of keys to values"
        case "tuple_type" | "list_type":
            return "expected a list"
        case "greater_than":
            return f"expected more than {context['gt']:g}"
        case "greater_than_equal":
            return f"expected at least {context['ge']:g}"
        case "less_than_equal":
            return f"expected at most {context['le']:g}"
        case _:
            return fault["msg"]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggest(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid keys: {', '.join(valid)}"


def _valid_keys(key_path: KeyPath, root: type[BaseModel]) -> list[str]:
    """The keys of the mapping at `key_path` of a file that `root` describes."""
    at = root
    for part in key_path:
        if isinstance(part, str):
            at = next(_models_in(at.model_fields[part].annotation))
    return list(at.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes that a field's type speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
