"""The picture in docs/design.md, enforced: every import points down.

Reads sources, imports nothing. An import counts wherever it stands: at the top, inside a function,
below `TYPE_CHECKING` (who names a layer's types depends on it), and as a constant name given to
`import_module` or `__import__`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

CORE, SCHED, SWITCHING = "aegaeon.core", "aegaeon.sched", "aegaeon.switching"
KERNELS, SERVER, PLUGIN = "aegaeon_kernels", "aegaeon.server", "aegaeon.vllm_plugin"

# layer -> what it may import besides itself and the standard library; the longest name wins.
MAY_IMPORT: dict[str, frozenset[str]] = {
    KERNELS: frozenset({"cupy", "numpy", "torch", "triton"}),
    CORE: frozenset({"pydantic", "pydantic_core", "yaml"}),
    SCHED: frozenset({CORE}),
    "aegaeon.sched.metrics": frozenset({CORE, SCHED, "prometheus_client"}),
    "aegaeon.switching.plan": frozenset({CORE}),
    SWITCHING: frozenset({CORE, "aegaeon.switching.plan", KERNELS, "prometheus_client"}),
    SERVER: frozenset(
        {CORE, "httpx", "opentelemetry", "prometheus_client", "pydantic", "rich", "starlette"}
        | {"textual", "uvicorn"}
    ),
    "aegaeon.sim": frozenset({CORE, SCHED, "aegaeon.switching.plan", "matplotlib", "pydantic"}),
    PLUGIN: frozenset(
        {CORE, SCHED, "aegaeon.sched.metrics", SWITCHING, "aegaeon.switching.plan", KERNELS}
        | {"PIL", "msgspec", "numpy", "packaging", "prometheus_client", "torch", "vllm", "zmq"}
    ),
    "aegaeon.build_image": frozenset({CORE, KERNELS, "tqdm"}),
    "aegaeon.checkpoint": frozenset({CORE, KERNELS, "safetensors"}),
    "aegaeon.tiny_model": frozenset(
        {"aegaeon.tiny_special", "tokenizers", "torch", "transformers"}
    ),
    "aegaeon.tiny_special": frozenset({"safetensors", "torch", "transformers"}),
}
# The modules that put the parts together: they may import every layer and each other.
COMPOSITION = frozenset(
    f"aegaeon.{name}"
    for name in (
        "__main__",
        "bench_report",
        "bench_serve",
        "cli",
        "cli_bench",
        "demo",
        "demo_report",
        "generate",
        "instance_process",
        "launch",
        "listeners",
        "local_server",
        "observers",
        "pool_check",
        "pool_reload",
        "roster",
        *("sim_cli", "sim_pool"),
        "stop_request",
        "supervisor",
        "watched_files",
    )
)
COMPOSITION_USES = frozenset(
    {
        "httpx",
        "openai",
        "prometheus_client",
        "psutil",
        "rich",
        "starlette",
        "typer",
        "uvicorn",
        "watchfiles",
    }
    | {"yaml"}
)
# Where `import aegaeon` itself may lead: its __init__ holds nothing.
PACKAGE = "aegaeon"


class Import(NamedTuple):
    target: str
    line: int


def layer_of(module: str) -> str | None:
    """The layer or composing module that owns a dotted name; None for a stranger."""
    owners = [*MAY_IMPORT, *COMPOSITION]
    matching = [name for name in owners if module == name or module.startswith(f"{name}.")]
    if not matching:
        return PACKAGE if module == PACKAGE else None
    return max(matching, key=len)


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every module that `source` names in an import, relative ones resolved.

    `from a.b import c` gives `a.b.c`: c may be a module, and if it is not, the owner is the same.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(base if alias.name == "*" else f"{base}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield Import(str(name.value), node.lineno)


def modules_under(root: Path) -> Iterator[tuple[Path, str]]:
    """(file, dotted name) of both packages in a source tree."""
    for base, folder in ((root, "aegaeon_kernels"), (root / "python", "aegaeon")):
        for path in sorted((base / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            yield path, ".".join(parts).removesuffix(".__init__")


def import_violations(root: Path) -> list[str]:
    found = []
    for path, module in modules_under(root):
        layer = layer_of(module)
        place = path.relative_to(root)
        if layer is None:
            found.append(f"{place}: {module} belongs to no layer; give it a line in MAY_IMPORT")
            continue
        for target, line in imports_of(
            path.read_text(), module, is_package=path.name == "__init__.py"
        ):
            if not may_import(layer, target):
                found.append(f"{place}:{line}: {layer} may not import {target}")
    return found


def may_import(layer: str, target: str) -> bool:
    owner = layer_of(target)
    top = target.split(".")[0]
    if owner is None and top in (PACKAGE, KERNELS):
        # `from aegaeon import x` with an unknown x: a name of the empty __init__, or a new module.
        return layer in COMPOSITION
    if owner == layer or top in sys.stdlib_module_names:
        return True
    if layer in COMPOSITION:
        return owner is not None or top in COMPOSITION_USES
    return layer != PACKAGE and (owner or top) in MAY_IMPORT[layer]


READS_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
ONLY_READER = Path("python/aegaeon/core/envs.py")


def environment_violations(root: Path) -> list[str]:
    found = []
    for path, _ in modules_under(root):
        place = path.relative_to(root)
        if place == ONLY_READER:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
                named = {node.attr}
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                named = {alias.name for alias in node.names}
            else:
                continue
            for name in sorted(named & READS_ENVIRONMENT):
                found.append(f"{place}:{node.lineno}: os.{name}; use aegaeon.core.envs")
    return found


COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
DRIVER_NAME = re.compile(r"\bcu[A-Z]\w*|\bCU(?:_|[a-z])\w*|[<\"]cuda(?:_runtime(?:_api)?)?\.h[>\"]")
PYBIND = re.compile(r"#\s*include\s*[<\"]pybind11/")


def native_violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix not in (".cpp", ".hpp", ".h", ".cu", ".cc"):
            continue
        place = path.relative_to(root).as_posix()
        # Comments may speak of the driver; line numbers survive their removal.
        text = COMMENT.sub(lambda match: "\n" * match[0].count("\n"), path.read_text())
        for line, content in enumerate(text.splitlines(), start=1):
            if PYBIND.search(content) and not place.startswith("csrc/bindings/"):
                found.append(f"{place}:{line}: only csrc/bindings may include pybind11")
            name = DRIVER_NAME.search(content)
            if name and place != "csrc/driver/libcuda.cpp":
                found.append(f"{place}:{line}: only csrc/driver/libcuda.cpp may name {name[0]}")
    return found


# ---- this repository ---------------------------------------------------------------------------


def test_every_import_points_down() -> None:
    assert import_violations(ROOT) == []


def test_only_the_plugin_has_heard_of_vllm() -> None:
    assert [layer for layer, allowed in MAY_IMPORT.items() if "vllm" in allowed] == [PLUGIN]
    assert "vllm" not in COMPOSITION_USES


def test_only_one_module_reads_the_environment() -> None:
    assert environment_violations(ROOT) == []


def test_the_driver_and_pybind11_stay_in_their_folders() -> None:
    assert native_violations(ROOT) == []


def test_the_sources_are_really_read() -> None:
    modules = {module for _, module in modules_under(ROOT)}
    assert {"aegaeon_kernels", "aegaeon.core.config", "aegaeon.core.envs"} <= modules
    assert len(list((ROOT / "csrc").rglob("*.cpp"))) > 5


def test_the_rules_have_no_circle() -> None:
    def below(layer: str, path: tuple[str, ...]) -> None:
        assert layer not in path, " -> ".join([*path, layer])
        for lower in MAY_IMPORT[layer] & MAY_IMPORT.keys():
            below(lower, (*path, layer))

    for layer in MAY_IMPORT:
        below(layer, ())


# ---- the reader of the rules -------------------------------------------------------------------

VIOLATIONS = {
    "plain": ("python/aegaeon/core/x.py", "import torch\n", "1: aegaeon.core may not import torch"),
    "submodule": (
        "aegaeon_kernels/x.py",
        "import vllm.v1.engine\n",
        "1: aegaeon_kernels may not import vllm.v1.engine",
    ),
    "from": (
        "aegaeon_kernels/x.py",
        "from aegaeon.core import clock\n",
        "1: aegaeon_kernels may not import aegaeon.core.clock",
    ),
    "from the package": (
        "python/aegaeon/sched/x.py",
        "from aegaeon import switching\n",
        "1: aegaeon.sched may not import aegaeon.switching",
    ),
    "relative": (
        "python/aegaeon/sched/policies/x.py",
        "from ...server import app\n",
        "1: aegaeon.sched may not import aegaeon.server.app",
    ),
    "relative, in a package's __init__": (
        "python/aegaeon/sched/__init__.py",
        "from ..launch import run\n",
        "1: aegaeon.sched may not import aegaeon.launch.run",
    ),
    "relative, bare": (
        "python/aegaeon/core/x.py",
        "from .. import vllm_plugin\n",
        "1: aegaeon.core may not import aegaeon.vllm_plugin",
    ),
    "for types only": (
        "python/aegaeon/server/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm import LLM\n",
        "3: aegaeon.server may not import vllm.LLM",
    ),
    "inside a function": (
        "python/aegaeon/launch.py",
        "def f():\n    from vllm import LLM\n",
        "2: aegaeon.launch may not import vllm.LLM",
    ),
    "by name": (
        "python/aegaeon/switching/x.py",
        "import importlib\nimportlib.import_module('torch')\n",
        "2: aegaeon.switching may not import torch",
    ),
    "the pure planner stays pure": (
        "python/aegaeon/switching/plan.py",
        "import aegaeon_kernels\n",
        "1: aegaeon.switching.plan may not import aegaeon_kernels",
    ),
    "the simulator plans but does not switch": (
        "python/aegaeon/sim/x.py",
        "from aegaeon.switching.switcher import Switcher\n",
        "1: aegaeon.sim may not import aegaeon.switching.switcher.Switcher",
    ),
    "the package itself": (
        "python/aegaeon/__init__.py",
        "from aegaeon.core import errors\n",
        "1: aegaeon may not import aegaeon.core.errors",
    ),
    "a module without a layer": (
        "python/aegaeon/stray.py",
        "",
        "aegaeon.stray belongs to no layer",
    ),
    "a third party nobody declared": (
        "python/aegaeon/cli.py",
        "import requests\n",
        "1: aegaeon.cli may not import requests",
    ),
}


def write(root: Path, name: str, source: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


@pytest.mark.parametrize("case", VIOLATIONS)
def test_an_import_that_points_up_is_caught(tmp_path: Path, case: str) -> None:
    name, source, message = VIOLATIONS[case]
    write(tmp_path, name, source)
    found = import_violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(name)
    assert message in found[0]


def test_imports_that_point_down_pass(tmp_path: Path) -> None:
    write(tmp_path, "aegaeon_kernels/x.py", "import os, torch\nfrom . import _C\n")
    write(tmp_path, "python/aegaeon/__init__.py", "")
    write(tmp_path, "python/aegaeon/core/x.py", "import yaml\nfrom .errors import E\n")
    write(tmp_path, "python/aegaeon/sched/x.py", "from aegaeon.core import clock\n")
    write(tmp_path, "python/aegaeon/sim/x.py", "from ..switching.plan import plan\n")
    write(tmp_path, "python/aegaeon/vllm_plugin/x.py", "import vllm\nfrom ..sched import x\n")
    write(tmp_path, "python/aegaeon/cli.py", "from aegaeon import launch, core\nimport typer\n")
    assert import_violations(tmp_path) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A'] = '1'\n",
        "import os\nos.getenv('A')\n",
        "from os import environ\n",
        "from os import getenv as g\n",
    ],
)
def test_reading_the_environment_elsewhere_is_caught(tmp_path: Path, source: str) -> None:
    write(tmp_path, "aegaeon_kernels/x.py", source)
    write(tmp_path, str(ONLY_READER), source)
    found = environment_violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith("aegaeon_kernels/x.py:")


@pytest.mark.parametrize(
    ("name", "source", "caught"),
    [
        ("csrc/vmm/a.cpp", "#include <pybind11/stl.h>\n", True),
        ("csrc/bindings/a.cpp", "#include <pybind11/stl.h>\n", False),
        ("csrc/vmm/a.cpp", "#include <cuda.h>\n", True),
        ("csrc/vmm/a.cpp", "int x;\nauto r = cuMemMap(p, n);\n", True),
        ("csrc/vmm/a.hpp", "CUdeviceptr p;\n", True),
        ("csrc/vmm/a.hpp", "int x = CU_MEM_ALLOCATION_TYPE_PINNED;\n", True),
        ("csrc/driver/libcuda.cpp", "#include <cuda.h>\nauto r = cuMemMap(p, n);\n", False),
        (
            "csrc/vmm/a.hpp",
            "// cuMemUnmap waits\n/* as does\n cuMemRelease */ int cursor;\n",
            False,
        ),
    ],
)
def test_the_driver_and_pybind11_elsewhere_are_caught(
    tmp_path: Path, name: str, source: str, caught: bool
) -> None:
    write(tmp_path, name, source)
    assert bool(native_violations(tmp_path)) is caught
