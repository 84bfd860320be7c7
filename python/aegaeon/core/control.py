"""The control channel between the launcher and an instance: JSON messages over a socket pair.

Carries orders, questions and reports; never a token and never a pickle.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from aegaeon.core.config import ModelConfig
from aegaeon.core.errors import AegaeonError, ConfigError, OrderRefused, UnknownModel

# How errors that the other side tells apart are named on the channel.
_ERRORS: Mapping[str, type[AegaeonError]] = {
    "unknown_model": UnknownModel,
    "refused": OrderRefused,
    "config": ConfigError,
    "failed": AegaeonError,
}


@dataclass(frozen=True)
class InstanceSpec:
    """All that an instance has to know.

    runtime_dir: holds the sockets; removed by whoever ends last.
    image_cache_directory: None: weights images are not kept on disk.
    addresses: model name -> `input_address` and `output_address` of vLLM's sockets.
    """

    device: str
    device_memory_bytes: int
    host_memory_bytes: int
    host_kv_memory_bytes: int
    runtime_dir: str
    policy: str
    quantum: int
    image_cache_directory: str | None
    image_cache_max_bytes: int
    models: tuple[ModelConfig, ...]
    addresses: Mapping[str, Mapping[str, str]]

    def to_message(self) -> dict[str, Any]:
        return {
            **vars(self),
            "models": [model.model_dump(mode="json") for model in self.models],
        }

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> "InstanceSpec":
        models = tuple(ModelConfig.model_validate(model) for model in message["models"])
        return cls(**{**message, "models": models})


def answer(number: int, value: Any) -> dict[str, Any]:
    """The message that answers the question `number`."""
    return {"answer": number, "value": value}


def failed_answer(number: int, error: BaseException) -> dict[str, Any]:
    """The message that answers the question `number` with an error."""
    kind = next(
        kind for kind, known in _ERRORS.items() if isinstance(error, known) or kind == "failed"
    )
    return {"answer": number, "error": kind, "message": str(error) or repr(error)}


def answered_error(message: Mapping[str, Any]) -> AegaeonError:
    """The error of a failed answer, as the exception it was over there."""
    return _ERRORS[message["error"]](message["message"])


class Channel:
    """One end of the channel; `send` may be called from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises OSError when the other side is gone."""
        payload = json.dumps(message).encode()
        with self._sending:
            self._connection.send_bytes(payload)

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the other side is gone."""
        try:
            payload = self._connection.recv_bytes()
        except (EOFError, OSError):
            return None
        message: dict[str, Any] = json.loads(payload)
        return message

    def close(self) -> None:
        self._connection.close()
