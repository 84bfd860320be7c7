"""The process group of experts exists, whichever model was loaded first."""

from typing import Any

import torch.distributed

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


def ensure_expert_group(model_config: Any) -> None:
    """Call before each model load: creates the group when a mixture of experts is the first one.

    Of the same ranks as vLLM makes it for one replica without context parallelism: all of them.
    """
    from vllm.distributed import parallel_state

    if not model_config.is_moe or parallel_state._EP is not None:
        return
    world = parallel_state.get_world_group()
    backend = torch.distributed.get_backend(world.device_group)
    parallel_state._EP = parallel_state.init_model_parallel_group(
        [world.ranks], world.local_rank, backend, group_name="ep"
    )


SEAM = Seam(
    name="expert_group",
    tier=Tier.PRIVATE,
    why="vLLM creates the expert group with the first model of a process, and only if that one is "
    "a mixture of experts; one loaded later finds no group",
    how="the group is created before the load of the first mixture of experts",
    upstream_link="https://github.com/vllm-project/vllm/issues/299",
    remove_when="vLLM keeps process groups per engine core",
    relies_on=(
        Upstream("vllm.distributed.parallel_state", "_EP"),
        Upstream("vllm.distributed.parallel_state", "get_world_group"),
        Upstream(
            "vllm.distributed.parallel_state",
            "init_model_parallel_group",
            ("group_ranks", "local_rank", "backend", "group_name"),
        ),
        Upstream("vllm.config.model", "ModelConfig.is_moe"),
    ),
)
