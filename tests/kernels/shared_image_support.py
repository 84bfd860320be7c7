"""Images that processes share by name, and the other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from kernel_support import pattern

import aegaeon_kernels as ak

PEER = """
import os, sys
import numpy as np
import aegaeon_kernels as ak
folder = sys.argv[1]
def make(name, size=1000, value=7):
    image = ak.HostImage.allocate(size, shared=True, directory=folder, name=name)
    np.frombuffer(image, np.uint8)[:] = value
    image.metadata = {"made by": os.getpid()}
    image.seal()
    return image
def open(name):
    return ak.HostImage.open_shared(name, directory=folder)
print("ready", flush=True)
for line in sys.stdin:
    try:
        try:
            print(repr(eval(line)), flush=True)
        except SyntaxError:
            exec(line)
            print("done", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


class Peer:
    """Another process, which runs what it is told to."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PEER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    def tell(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def do(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def kill(self) -> None:
        self._process.kill()
        self.close()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def make(folder: Path, name: str = "qwen", size: int = 1000, seed: int = 1) -> ak.HostImage:
    image = ak.HostImage.allocate(size, shared=True, directory=folder, name=name)
    np.frombuffer(image, np.uint8)[:] = pattern(size, seed)
    image.metadata = {"model": "qwen"}
    image.layout_json = b"[0]"
    image.seal()
    return image


def shm_used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize
