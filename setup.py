"""Runs CMake for the native module and names the two packages; flags and file lists are CMake's."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        configure = ["cmake", "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
        if not (build / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", target], check=True)


setup(
    packages=[
        *find_packages(include=["aegaeon_kernels", "aegaeon_kernels.*"]),
        *find_packages("python"),
    ],
    package_data={
        "aegaeon_kernels": ["py.typed", "*.pyi"],
        "aegaeon": ["**/*"],
    },
    exclude_package_data={"": ["**/*.pyc", "**/__pycache__/*"]},
    ext_modules=[Extension("aegaeon_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
