"""On the CPU, vLLM's replacements of Triton kernels are registered once per process."""

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


def _register_once() -> None:
    from vllm.platforms.cpu import CpuPlatform

    register = CpuPlatform.register_triton_kernel_overrides
    done = False

    def once() -> None:
        nonlocal done
        if not done:
            register()
            done = True

    CpuPlatform.register_triton_kernel_overrides = staticmethod(once)


SEAM = Seam(
    name="kernel_overrides",
    tier=Tier.PRIVATE,
    why="every worker that vLLM builds registers its CPU kernels anew: it looks through all "
    "modules of the process, and wraps the wrappers of the time before",
    how="CpuPlatform.register_triton_kernel_overrides acts on its first call only",
    upstream_link="https://github.com/vllm-project/vllm/blob/main/vllm/triton_utils/dispatcher.py",
    remove_when="registering twice does nothing the second time",
    relies_on=(
        Upstream("vllm.platforms.cpu", "CpuPlatform.register_triton_kernel_overrides"),
        Upstream("vllm.triton_utils.dispatcher", "register_kernels", ("overrides",)),
    ),
    apply=_register_once,
)
