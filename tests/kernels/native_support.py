"""The native test program: built once, in a folder that is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native-tests"


def build_program() -> Path:
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"]
    configure += ["-DAEGAEON_WERROR=ON", "-DAEGAEON_BUILD_MODULE=OFF", "-DAEGAEON_BUILD_TESTS=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "csrc" / "tests" / "aegaeon_native_tests"
