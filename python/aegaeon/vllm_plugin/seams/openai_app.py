"""vLLM's own OpenAI application for one model, attached to an engine core in another process."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from aegaeon.core.threads import in_daemon_thread
from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


async def attach(config: VllmConfig, addresses: Mapping[str, str]) -> AsyncLLM:
    """A client of the engine core that connects to `addresses`; returns when it has.

    The constructor waits for the engine core, for ever if that has died: a thread of its own.
    """
    return await in_daemon_thread(
        lambda: AsyncLLM.from_vllm_config(
            vllm_config=config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            client_addresses=dict(addresses),
        )
    )


def report_death(client: AsyncLLM) -> None:
    """Tell `client` that its engine core is gone: open and later requests end with an error.

    What vLLM's own process monitor does for engine processes that the client has started itself.
    """
    core = client.engine_core
    core.resources.engine_dead = True
    core.outputs_queue.put_nowait(EngineDeadError())
    if client.logger_manager is not None:
        # Else the gauges would show its last requests as running until the next one comes.
        client.logger_manager.record(scheduler_stats=SchedulerStats(), iteration_stats=None)


async def openai_app(client: AsyncLLM, namespace: Namespace) -> Any:
    """vLLM's FastAPI application over `client`, with every route that the model supports."""
    tasks = await client.get_supported_tasks()
    app = build_app(namespace, tasks, client.model_config)
    await init_app_state(client, app.state, namespace, tasks)
    # vLLM's error handler asks this server to exit when the engine is dead. Ours goes on: the
    # other models are alive.
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def rename(app: Any, names: Sequence[str]) -> None:
    """Have an application of `openai_app` answer to these names, and to no others."""
    # In place: the parts of the application share the list.
    served = app.state.openai_serving_models.base_model_paths
    served[:] = [BaseModelPath(name=name, model_path=served[0].model_path) for name in names]


SEAM = Seam(
    name="openai_app",
    tier=Tier.PRIVATE,
    why="clients get vLLM's own OpenAI behaviour, per model, from code that is vLLM's",
    how="AsyncLLM with client_addresses, as vLLM's own API server processes use it; build_app and "
    "init_app_state per model",
    upstream_link="https://github.com/vllm-project/vllm/issues/11410",
    remove_when="vLLM serves several models from one server",
    relies_on=(
        Upstream(
            "vllm.v1.engine.async_llm",
            "AsyncLLM.from_vllm_config",
            ("vllm_config", "usage_context", "client_addresses"),
        ),
        Upstream(
            "vllm.entrypoints.launchers.app",
            "build_app",
            ("args", "supported_tasks", "model_config"),
        ),
        Upstream(
            "vllm.entrypoints.launchers.api_server.app_state",
            "init_app_state",
            ("engine_client", "state", "args", "supported_tasks"),
        ),
        Upstream(
            "vllm.entrypoints.openai.models.protocol", "BaseModelPath", ("name", "model_path")
        ),
        Upstream(
            "vllm.entrypoints.openai.models.serving",
            "OpenAIModelRegistry.__init__",
            ("model_config", "base_model_paths"),
        ),
        Upstream("vllm.v1.engine.core_client", "AsyncMPClient.outputs_queue"),
        Upstream("vllm.v1.engine.async_llm", "AsyncLLM.logger_manager"),
        Upstream(
            "vllm.v1.metrics.loggers",
            "StatLoggerManager.record",
            ("scheduler_stats", "iteration_stats"),
        ),
        Upstream("vllm.v1.engine.core_client", "BackgroundResources.engine_dead"),
        Upstream("vllm.entrypoints.launchers.cli_args", "make_arg_parser", ("parser",)),
        Upstream("vllm.entrypoints.launchers.cli_args", "validate_parsed_serve_args", ("args",)),
    ),
)
