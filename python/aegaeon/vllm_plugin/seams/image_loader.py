"""A model whose weights come from an image is built without reading its checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream

LOAD_FORMAT = "aegaeon-image"


@contextmanager
def weights_left_out(load_config: Any) -> Iterator[None]:
    """A model that vLLM loads inside has parameters of undefined contents."""
    before = load_config.load_format
    load_config.load_format = LOAD_FORMAT
    try:
        yield
    finally:
        load_config.load_format = before


def _register() -> None:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class NoWeightsLoader(BaseModelLoader):
        """Builds the module tree; the bytes are put under it afterwards."""

        def download_model(self, model_config: Any) -> None:
            """There is nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            """They stay as they were allocated."""

    register_model_loader(LOAD_FORMAT)(NoWeightsLoader)


SEAM = Seam(
    name="image_loader",
    tier=Tier.DOCUMENTED,
    why="weights that a saved image has need not be read from the checkpoint and processed again",
    how="a model loader that loads nothing is registered as a load format",
    upstream_link="https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/model_loader/__init__.py",
    remove_when="never: a documented extension point",
    relies_on=(
        Upstream("vllm.model_executor.model_loader", "register_model_loader", ("load_format",)),
        Upstream(
            "vllm.model_executor.model_loader.base_loader",
            "BaseModelLoader.load_weights",
            ("model", "model_config"),
        ),
        Upstream(
            "vllm.model_executor.model_loader.base_loader",
            "BaseModelLoader.download_model",
            ("model_config",),
        ),
        Upstream("vllm.config.load", "LoadConfig.load_format"),
    ),
    apply=_register,
)
