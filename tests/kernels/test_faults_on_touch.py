"""Touching memory that is not there ends the process, as it would end a kernel: no silent reads.

Each case runs in a process of its own.
"""

from __future__ import annotations

import signal

import pytest
from kernel_support import run_program

SETUP = """
import ctypes, sys
import aegaeon_kernels as ak
G = 2 << 20
device = ak.Device("host", memory_bytes=64 << 20)
arena = ak.Arena(device, capacity_bytes=16 * G, handle_bytes=2 * G)
region = arena.reserve(8 * G, owner="a")
def touch(offset, size=1):
    return ctypes.string_at(region.address + offset, size)
def write(offset):
    ctypes.memset(region.address + offset, 1, 1)
"""

FATAL = {
    "read before the first map": "touch(0)",
    "read of an unmapped part": "region.map(0, 2 * G); touch(2 * G)",
    "read just before": "region.map(2 * G, 2 * G); touch(2 * G - 1)",
    "read after unmap": "region.map(); touch(0); region.unmap(); touch(0)",
    "write after unmap": "region.map(); write(5); region.unmap(); write(5)",
    "read after unmap of a part": "region.map(); touch(0, 8 * G); region.unmap(2 * G, 2 * G); "
    "touch(0, 2 * G); touch(4 * G, 4 * G); touch(2 * G)",
    "read after close": "region.map(); touch(0); region.close(); touch(0)",
    "tensor after unmap": "import torch; region.map(); t = region.tensor((G,), torch.uint8); "
    "t.fill_(1); region.unmap(); t.sum()",
    "tensor after close": "import torch; region.map(); t = region.tensor((G,), torch.uint8); "
    "t.fill_(1); region.close(abandon_views=True); "
    "other = arena.reserve(8 * G, owner='b'); other.map(); t.sum()",
    "mapped without access": "d = device._driver; _, h = d.mem_create(G); "
    "assert d.mem_map(region.address, G, 0, h) == 0; touch(0)",
    "write to read-only": "d = device._driver; _, h = d.mem_create(G); "
    "assert d.mem_map(region.address, G, 0, h) == 0; "
    "assert d.mem_set_access(region.address, G, ak._C.Access.READ) == 0; touch(0); write(0)",
    "access taken back": "d = device._driver; _, h = d.mem_create(G); "
    "assert d.mem_map(region.address, G, 0, h) == 0; "
    "assert d.mem_set_access(region.address, G, ak._C.Access.READWRITE) == 0; write(0); "
    "assert d.mem_set_access(region.address, G, ak._C.Access.NONE) == 0; touch(0)",
    "alias after unmap": "d = device._driver; _, h = d.mem_create(G)\n"
    "for at in (0, G):\n"
    "    assert d.mem_map(region.address + at, G, 0, h) == 0\n"
    "    assert d.mem_set_access(region.address + at, G, ak._C.Access.READWRITE) == 0\n"
    "write(0); touch(G); d.mem_unmap(region.address, G); touch(G); touch(0)",
}


@pytest.mark.parametrize("case", FATAL)
def test_touching_what_is_not_there_is_a_fault(case: str) -> None:
    *before, last = FATAL[case].replace("\n", "\0").rpartition("; ")
    program = SETUP + "".join(before).replace("\0", "\n").rstrip("; ") + "\n"
    result = run_program(program + "print('about to fault', flush=True)\n" + last)
    assert "about to fault" in result.stdout, f"it failed before the last touch: {result.stderr}"
    assert result.returncode == -signal.SIGSEGV


def test_the_same_touches_work_while_it_is_mapped() -> None:
    program = "region.map(); touch(0, 8 * G); write(8 * G - 1); region.unmap(); region.map(); "
    result = run_program(SETUP + program + "assert touch(8 * G - 1) == b'\\x01'; print('ok')")
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


@pytest.mark.parametrize("end", ["", "import os; os._exit(0)", "sys.exit(0)", "del arena, device"])
def test_a_process_ends_cleanly_in_the_middle_of_things(end: str) -> None:
    program = (
        "region.map(); pf = ak.Prefetcher(device); image = ak.HostImage.allocate(8 * G)\n"
        "tickets = [pf.load(image, region) for _ in range(20)]\n"
    )
    result = run_program(SETUP + program + end)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_forked_child_can_end_and_leaves_the_parent_alone() -> None:
    program = (
        "import os\n"
        "region.map(); pf = ak.Prefetcher(device); image = ak.HostImage.allocate(8 * G)\n"
        "pf.load(image, region).wait()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    del pf, region, arena, image, device\n"
        "    sys.exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
        "write(0); pf.load(image, region).wait(); region.unmap(); print('ok')\n"
    )
    result = run_program(SETUP + program)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr
