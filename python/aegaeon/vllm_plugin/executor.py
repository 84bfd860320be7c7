"""The executor of a hosted engine core: one worker, in the instance's own process."""

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class HostedExecutor(UniProcExecutor):
    """vLLM's single-process executor, under a name of its own.

    Given to vLLM as a class: on the CPU vLLM turns the *name* "uni" into a worker process per
    model, which is what hosting several models in one process is meant to avoid.
    """
