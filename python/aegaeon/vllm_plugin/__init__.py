"""The thin layer over vLLM: many models in one engine process, switched between steps.

The only package of this project that imports vLLM; each place that it touches is one file in
`seams/`. Importing this module imports nothing of vLLM and changes nothing.
"""

import logging

from aegaeon.core import envs

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in each of its processes.

    Does nothing unless AEGAEON_ENABLE=1. Safe to call again.
    """
    if not envs.enable():
        return
    from aegaeon.vllm_plugin.seams import apply_all

    applied = apply_all()
    if applied:
        logger.info("aegaeon is enabled: %s", ", ".join(applied))
