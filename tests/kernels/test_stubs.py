"""The native module's stub file says what the module is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import aegaeon_kernels as ak

# Without this mypy reads all of torch, and misses stubs of triton and cupy, which may not be there.
MYPY_CONFIG = """
[mypy]
[mypy-torch.*,triton.*,numpy.*,cupy.*]
follow_imports = skip
follow_imports_for_stubs = true
ignore_missing_imports = true
"""


def test_the_stub_matches_the_module(tmp_path: Path) -> None:
    config = tmp_path / "mypy.ini"
    config.write_text(MYPY_CONFIG)
    environment = dict(os.environ)
    root = Path(ak.__file__).parent.parent
    if root.name != "site-packages":  # a checkout: mypy does not look into editable installations
        environment["MYPYPATH"] = str(root)
    allowlist = Path(__file__).with_name("stubtest_allowlist.txt")
    command = [sys.executable, "-m", "mypy.stubtest", "aegaeon_kernels._C"]
    command += ["--allowlist", str(allowlist), "--mypy-config-file", str(config)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stdout


def test_the_package_is_typed() -> None:
    folder = Path(ak.__file__).parent
    assert (folder / "py.typed").exists()
    assert (folder / "_C.pyi").exists()


def test_every_public_name_exists() -> None:
    for name in ak.__all__:
        assert hasattr(ak, name), name
