"""In an instance: once, at a named point, the process kills or stops itself.

Found by Python on PYTHONPATH. The file of AEGAEON_CHAOS_FILE says `<point> <signal>`; whoever
reaches the point takes the file away and does it. POINTS is also the list for the tests.
"""

import importlib.util
import os
import signal
import sys
from contextlib import suppress
from functools import wraps

# point -> module, function in it, and whether it is reached before or after the call.
POINTS = {
    "switch planned": ("aegaeon.switching.switcher", "Switcher._plan", "after"),
    "switch before save": ("aegaeon.switching.switcher", "Switcher._save", "before"),
    "switch after save": ("aegaeon.switching.switcher", "Switcher._save", "after"),
    "switch before unmap": ("aegaeon.switching.residency", "KVUnit.unmap", "before"),
    "switch between unmaps": ("aegaeon.switching.residency", "KVUnit.unmap", "after"),
    "switch after unmap": ("aegaeon.switching.residency", "WeightsUnit.unmap", "after"),
    "switch before map": ("aegaeon.switching.residency", "Unit.map", "before"),
    "switch between maps": ("aegaeon.switching.residency", "Unit.map", "after"),
    "switch before load": ("aegaeon.switching.switcher", "Switcher._load", "before"),
    "switch after load": ("aegaeon.switching.switcher", "Switcher._load", "after"),
    "switch before current": ("aegaeon.switching.switcher", "Switcher.make_current", "before"),
    "switch after current": ("aegaeon.switching.switcher", "Switcher.make_current", "after"),
    "switch recorded": ("aegaeon.switching.switcher", "Switcher._record", "after"),
    "request polled": ("aegaeon.vllm_plugin.seams.engine_core", "HostedEngineCore.poll", "after"),
    "request before step": (
        *("aegaeon.vllm_plugin.seams.engine_core", "HostedEngineCore.run_step"),
        "before",
    ),
    "request after step": (
        *("aegaeon.vllm_plugin.seams.engine_core", "HostedEngineCore.run_step"),
        "after",
    ),
    "request computed": ("aegaeon.vllm_plugin.executor", "HostedExecutor.execute_model", "after"),
    "question": ("aegaeon.core.control", "Channel.send", "before"),
    "start before load": ("aegaeon.vllm_plugin.worker", "ArenaWorker.load_model", "before"),
    "start after load": ("aegaeon.vllm_plugin.worker", "ArenaWorker.load_model", "after"),
}


def _reached(point):
    file = os.environ["AEGAEON_CHAOS_FILE"]
    with suppress(OSError), open(file) as armed:  # noqa: PTH123 - as little as possible here
        wanted, _, name = armed.read().rpartition(" ")
        if wanted == point:
            os.rename(file, f"{file}.taken")  # noqa: PTH104
            os.kill(os.getpid(), getattr(signal, name))


def _hook(module, function, point, when):
    owner_name, _, name = function.rpartition(".")
    owner = getattr(module, owner_name)
    original = getattr(owner, name)

    @wraps(original)
    def hooked(*args, **kwargs):
        if when == "before":
            _reached(point)
        result = original(*args, **kwargs)
        if when == "after":
            _reached(point)
        return result

    setattr(owner, name, hooked)


class _Finder:
    """Hooks a module's functions when it has been executed."""

    def find_spec(self, name, path=None, target=None):
        points = {point: place for point, place in POINTS.items() if place[0] == name}
        if not points:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def execute_and_hook(module):
            execute(module)
            for point, (_, function, when) in points.items():
                _hook(module, function, point, when)

        spec.loader.exec_module = execute_and_hook
        return spec


if "AEGAEON_CHAOS_FILE" in os.environ and "aegaeon.vllm_plugin.instance" in sys.orig_argv:
    sys.meta_path.insert(0, _Finder())
