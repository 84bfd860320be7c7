"""The front's half of vLLM: one OpenAI application and one engine client per model."""

import gc
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from aegaeon.core.config import ModelConfig
from aegaeon.core.errors import ConfigError
from aegaeon.core.serving import ServedModel
from aegaeon.core.threads import in_daemon_thread
from aegaeon.vllm_plugin.engine_config import engine_config, serve_args
from aegaeon.vllm_plugin.seams import apply_all
from aegaeon.vllm_plugin.seams.openai_app import attach, openai_app, rename, report_death


class Front:
    """Clients of the engine cores of one instance, and the applications over them.

    names: of all models, which no adapter may have.
    """

    def __init__(self, device_kind: str, names: Iterable[str]) -> None:
        apply_all()
        self._device_kind = device_kind
        self._owners = {name: name for name in names}
        self._clients: dict[str, AsyncLLM] = {}

    async def serve(self, model: ModelConfig, addresses: Mapping[str, str]) -> ServedModel:
        """Attach to the engine core of `model`, once it is loaded, and build its application."""
        if self._owners.setdefault(model.name, model.name) != model.name:
            raise ConfigError(f"the name {model.name!r} is that of an adapter")
        namespace = serve_args(model, device_kind=self._device_kind)
        adapters = self._adapters_of(model, namespace)
        # Reads files, and inspects the model in a process of its own: not on the event loop.
        config = await in_daemon_thread(
            lambda: engine_config(namespace, model=model.name, device_kind=self._device_kind)
        )
        client = await attach(config, addresses)
        self._clients[model.name] = client
        app = await openai_app(client, namespace)

        listed = app.state.openai_serving_models  # of the state: that ends with the application

        async def cards() -> list[dict[str, Any]]:
            listing = await listed.show_available_models()
            return [card.model_dump() for card in listing.data]

        return ServedModel(
            name=model.name,
            aliases=model.aliases,
            adapters=tuple(adapters),
            app=app,
            cards=cards,
            rename=lambda aliases: rename(app, (model.name, *aliases)),
        )

    def _adapters_of(self, model: ModelConfig, namespace: Namespace) -> list[str]:
        """Names of its LoRA adapters, under which the model is served too."""
        names = [adapter.name for adapter in namespace.lora_modules or ()]
        for name in names:
            # Of a later instance the adapters are the same again.
            if self._owners.setdefault(name, model.name) != model.name or name in model.names:
                raise ConfigError(
                    f"model {model.name!r}: vllm.lora_modules: the name {name!r} is taken"
                )
        return names

    def instance_died(self) -> None:
        """End the open requests of all models with an error."""
        for client in self._clients.values():
            report_death(client)

    def leave(self, name: str) -> None:
        """Let go of one engine core, which has no open requests."""
        client = self._clients.pop(name, None)
        if client is not None:
            client.shutdown()
        self._owners = {each: owner for each, owner in self._owners.items() if owner != name}
        # vLLM's application freezes what there is when it starts, as if it were there for good.
        gc.unfreeze()
        gc.collect()

    def close(self) -> None:
        """Let go of the engine cores; the models of another instance may be served afterwards."""
        for client in self._clients.values():
            client.shutdown()
        self._clients.clear()
