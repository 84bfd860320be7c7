"""The routes of vLLM's own application for every kind of model, and its OpenAPI document."""

import json
import sys
from typing import get_args

from aegaeon.core import envs
from aegaeon.core.config import ModelConfig

envs.set_vllm_defaults()

from vllm.entrypoints.launchers.app import build_app  # noqa: E402
from vllm.tasks import SupportedTask  # noqa: E402

from aegaeon.vllm_plugin.engine_config import serve_args  # noqa: E402


def tasks_of(kind: object) -> list[str]:
    """The strings of a Literal, or of a union of them."""
    parts = get_args(kind)
    return [kind] if not parts else [task for part in parts for task in tasks_of(part)]


def main() -> None:
    job = json.load(sys.stdin)
    namespace = serve_args(ModelConfig(model=job["model"], name="m"), device_kind="host")
    found = set()
    for task in tasks_of(SupportedTask):
        app = build_app(namespace, (task,), None)
        found |= {
            (route.path, *sorted(getattr(route, "methods", None) or ())) for route in app.routes
        }
    generating = build_app(namespace, ("generate",), None)
    print(json.dumps({"routes": sorted(found), "openapi": generating.openapi()}))


if __name__ == "__main__":
    main()
