"""What the world does to image files: no file, no room, no permission, killed, interrupted."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest
from image_file_support import (
    CHUNK,
    listed,
    make_image,
    nothing_left,
    saved,
    sealed_image,
)
from kernel_support import MIB, pattern, run_program

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal


def test_what_is_no_file_is_an_os_error_or_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        ak.HostImage.open(tmp_path / "nowhere")
    assert caught.value.filename == str(tmp_path / "nowhere")
    with pytest.raises(ak.IntegrityError, match="not a file"):
        ak.HostImage.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ak.IntegrityError, match="not a file"):  # and does not wait for a writer
        ak.HostImage.open(tmp_path / "pipe")
    image = sealed_image(10)
    with pytest.raises(FileNotFoundError):
        image.save(tmp_path / "nowhere" / "x")
    with pytest.raises(IsADirectoryError):
        image.save(tmp_path)
    with pytest.raises(ValueError, match="does not name a file"):
        image.save(f"{tmp_path}/..")
    assert listed(tmp_path) == {"pipe"}


def test_names_need_not_be_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.image"))
    sealed_image(10).save(path)
    image = ak.HostImage.open(path)
    assert image.name == "\\xff.image"
    path.write_bytes(b"nothing")
    with pytest.raises(ak.IntegrityError, match="not an image"):
        ak.HostImage.open(path)
    path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        ak.HostImage.open(path)
    assert caught.value.filename == str(path)


def test_only_a_sealed_image_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ak.LifecycleError, match="not sealed"):
        make_image(10).save(tmp_path / "x")
    assert listed(tmp_path) == set()


def test_no_memory_for_an_image_leaves_nothing(host: FaultyDevice, tmp_path: Path) -> None:
    path = saved(tmp_path, MIB)
    host.fail_call(1, call="host_alloc", code=2)
    with nothing_left(), pytest.raises(ak.OutOfMemory):
        ak.HostImage.open(path, device=host)
    pool = ak.HostPool(host, 64 << 10)
    with nothing_left(), pytest.raises(ak.OutOfMemory, match="asked a host pool for 1 MiB"):
        ak.HostImage.open(path, pool=pool)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's."""
    path = saved(tmp_path, 2 * MIB, seed=1)
    program = """
import resource, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(20 << 20)
image.seal()
resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))
try:
    image.save(sys.argv[1])
except OSError as error:
    print(error.errno, error.filename == sys.argv[1])
"""
    result = run_program(program, str(path))
    assert result.stdout == "27 True\n", result.stderr  # EFBIG
    assert listed(tmp_path) == {path.name}
    assert_bitwise_equal(memoryview(ak.HostImage.open(path)), pattern(2 * MIB, 1))


def test_a_killed_saver_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = saved(tmp_path, 2 * MIB, seed=1)
    program = """
import os, signal, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(80 << 20)
image.seal()
def kill(done, total):
    if done > 16 << 20:
        os.kill(os.getpid(), signal.SIGKILL)
image.save(sys.argv[1], num_threads=1, on_progress=kill)
"""
    assert run_program(program, str(path)).returncode == -signal.SIGKILL
    assert listed(tmp_path) == {path.name}
    assert_bitwise_equal(memoryview(ak.HostImage.open(path)), pattern(2 * MIB, 1))


def test_ctrl_c_ends_a_long_read(tmp_path: Path) -> None:
    program = """
import os, signal, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(200 << 20)
image.seal()
image.save(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
main = os.getpid()
def interrupt(done, total):
    os.kill(main, signal.SIGINT)
try:
    ak.HostImage.open(sys.argv[1], num_threads=1, on_progress=interrupt)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run_program(program, str(tmp_path / "x")).stdout == "interrupted\n"


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 4 * CHUNK)

    def shrink(done: int, total: int) -> None:
        os.truncate(path, 2 * CHUNK)

    with nothing_left(), pytest.raises(ak.IntegrityError, match="ends at byte"):
        ak.HostImage.open(path, num_threads=1, on_progress=shrink)


def test_a_folder_without_permission_is_an_os_error() -> None:
    program = """
import os, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(10)
image.seal()
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    image.save(sys.argv[1] + "/x")
except PermissionError:
    print("refused")
"""
    # Not below pytest's own folders, which other users may not even enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        result = run_program(program, name)
        assert result.stdout == "refused\n", result.stderr
        assert listed(folder) == set()
