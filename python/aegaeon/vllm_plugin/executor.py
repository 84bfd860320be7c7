"""The executor of a hosted engine core: one worker, in the instance's own process."""

from collections.abc import Callable
from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class HostedExecutor(UniProcExecutor):
    """vLLM's single-process executor, under a name of its own.

    Given to vLLM as a class: on the CPU vLLM turns the *name* "uni" into a worker process per
    model, which is what hosting several models in one process is meant to avoid.

    before_step: called with what the scheduler has decided, before the worker sees it.
    """

    before_step: Callable[[Any], None] = staticmethod(lambda scheduler_output: None)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        self.before_step(scheduler_output)
        return super().execute_model(scheduler_output, non_block)
