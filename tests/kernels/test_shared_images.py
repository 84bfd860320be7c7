"""Images that processes share by name: who sees them, who keeps them, and what a killed one leaves.

The other processes here are real ones, and they die by SIGKILL.
"""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kernel_support import MIB, StubCuda, pattern, run_program

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

CHUNK = _C.IMAGE_CHUNK_BYTES

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


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, as in use; and afterwards nothing is in it."""
    gc.collect()
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)
        gc.collect()
        assert list(Path(name).iterdir()) == [], "a file is left"
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


@pytest.fixture
def peers(folder: Path) -> Iterator[list[Peer]]:
    started = [Peer(folder), Peer(folder)]
    yield started
    for peer in started:
        peer.close()


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


# ---- one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096, CHUNK + 5])
def test_an_opened_image_shows_the_same_bytes_read_only(
    device: FaultyDevice, folder: Path, size: int
) -> None:
    image = ak.HostImage.allocate(size, device=device, shared=True, directory=folder, name="a")
    view = np.frombuffer(image, np.uint8)
    assert not view.any()
    view[:] = pattern(size, seed=1)
    assert image.pinned == (device.kind == "cuda")
    image.metadata = {"model": "qwen"}
    image.layout_json = b"[0]"
    image.seal()
    assert ak.HostImage.published(folder) == []
    assert (image.published_name, image.leased) == (None, False)
    image.publish()
    assert ak.HostImage.published(folder) == ["a"]
    assert (image.published_name, image.leased) == ("a", False)
    opened = ak.HostImage.open_shared("a", device=device, directory=folder)
    assert (opened.sealed, opened.name, opened.published_name) == (True, "a", None)
    assert opened.pinned == (device.kind == "cuda")
    assert opened.metadata == {"model": "qwen"}
    assert opened.layout_json == b"[0]"
    assert opened.checksums() == image.checksums()
    assert image.leased
    assert opened.leased
    assert memoryview(opened).readonly
    assert_bitwise_equal(memoryview(opened), pattern(size, seed=1))
    opened.verify()
    assert device.live == {"registrations": 2}
    del opened, view
    assert not image.leased
    del image
    assert device.live == {}


def test_a_shared_image_is_a_file_of_its_owner_alone(folder: Path) -> None:
    inner = folder / "made"
    image = make(inner)
    assert list(inner.iterdir()) == []
    image.publish("b")
    assert stat.S_IMODE(inner.stat().st_mode) == 0o700
    assert stat.S_IMODE((inner / "b.image").stat().st_mode) == 0o600
    image.unpublish()
    inner.rmdir()


def test_by_default_it_is_in_a_folder_of_the_user() -> None:
    name = f"test-{os.getpid()}"
    image = ak.HostImage.allocate(10, shared=True, name=name)
    image.seal()
    image.publish()
    path = Path(f"/dev/shm/aegaeon-{os.geteuid()}")
    assert (path / f"{name}.image").exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert name in ak.HostImage.published()
    assert bytes(ak.HostImage.open_shared(name)) == bytes(10)
    assert name not in ak.HostImage.collect_garbage()
    del image
    assert name not in ak.HostImage.published()


def test_a_name_ends_with_unpublish_and_readers_keep_the_memory(folder: Path) -> None:
    image = make(folder, size=3 * MIB)
    image.publish()
    opened = ak.HostImage.open_shared("qwen", directory=folder)
    image.unpublish()
    assert ak.HostImage.published(folder) == []
    with pytest.raises(FileNotFoundError):
        ak.HostImage.open_shared("qwen", directory=folder)
    assert image.published_name is None
    used = shm_used(folder)
    del image
    gc.collect()
    assert_bitwise_equal(memoryview(opened), pattern(3 * MIB, seed=1))
    assert shm_used(folder) >= used - MIB
    del opened
    gc.collect()
    assert shm_used(folder) <= used - 3 * MIB


def test_a_name_ends_with_its_image(folder: Path) -> None:
    image = make(folder)
    image.publish()
    view = memoryview(image)
    del image
    assert ak.HostImage.published(folder) == ["qwen"]
    view.release()
    assert ak.HostImage.published(folder) == []


def test_what_does_not_fit_the_state_is_refused(folder: Path) -> None:
    plain = ak.HostImage.allocate(10)
    plain.seal()
    with pytest.raises(ValueError, match="shared=True"):
        plain.publish("x")
    with pytest.raises(ak.LifecycleError, match="not published"):
        plain.unpublish()
    assert (plain.leased, plain.published_name, plain.pin_error) == (False, None, None)
    image = ak.HostImage.allocate(10, shared=True, directory=folder)
    with pytest.raises(ak.LifecycleError, match="not sealed"):
        image.publish("x")
    image.seal()
    with pytest.raises(ak.LifecycleError, match="not published"):
        image.unpublish()
    image.publish("x")
    with pytest.raises(ak.LifecycleError, match="already"):
        image.publish("y")
    image.unpublish()
    for name in ("x", "y"):
        with pytest.raises(ak.LifecycleError, match="already"):
            image.publish(name)
    with pytest.raises(ValueError, match="pool"):
        ak.HostImage.allocate(
            10, shared=True, pool=ak.HostPool(ak.Device("host", memory_bytes=MIB), MIB)
        )
    with pytest.raises(ValueError, match="directory"):
        ak.HostImage.allocate(10, directory=folder)


BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "-x", "a b", "a\0b", "ä"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "x" * 201])
def test_a_name_is_not_a_path(folder: Path, name: str) -> None:
    image = make(folder, name="unnamed")
    if name:  # none: the image's own
        with pytest.raises(ValueError, match="no name for a shared image"):
            image.publish(name)
    with pytest.raises(ValueError, match="no name for a shared image"):
        ak.HostImage.open_shared(name, directory=folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "Qwen3-8B.fp8_rank0", "x" * 200, "0"])
def test_a_name_of_letters_digits_dots_dashes_is_one(folder: Path, name: str) -> None:
    image = make(folder)
    image.publish(name)
    assert ak.HostImage.published(folder) == [name]
    assert ak.HostImage.open_shared(name, directory=folder).name == name


def test_a_folder_that_others_may_write_to_is_not_trusted(folder: Path) -> None:
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(0o770)
    with pytest.raises(PermissionError, match="others may write"):
        make(shared)
    shared.rmdir()
    link = folder / "link"
    link.symlink_to(folder)
    with pytest.raises(OSError, match="cannot open"):
        ak.HostImage.published(link)
    link.unlink()


def test_a_link_of_that_name_is_not_followed(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"secret")
    (folder / "x.image").symlink_to(target)
    with pytest.raises(OSError, match="cannot open"):
        ak.HostImage.open_shared("x", directory=folder)
    (folder / "x.image").unlink()
    assert target.read_bytes() == b"secret"


def test_a_file_that_is_no_image_or_altered_is_refused(folder: Path) -> None:
    image = make(folder, size=2 * CHUNK + 3)
    image.publish("good")
    data = bytearray((folder / "good.image").read_bytes())
    bad = folder / "bad.image"

    def refused(message: str) -> None:
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        bad.write_bytes(data)
        host = FaultyDevice(ak.Device("host", memory_bytes=MIB))
        with pytest.raises(ak.IntegrityError, match=message) as caught:
            ak.HostImage.open_shared("bad", directory=folder, device=host)
        assert "'bad'" in str(caught.value)
        assert host.live == {}
        assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208

    data[CHUNK] ^= 1
    refused(r"chunk 1 \[")
    unverified = ak.HostImage.open_shared("bad", directory=folder, verify=False)
    with pytest.raises(ak.IntegrityError, match=r"chunk 1 \["):
        unverified.verify()
    del unverified
    data[CHUNK] ^= 1
    data[-70] ^= 1
    refused("footer")
    data[-70] ^= 1
    del data[-1]
    refused("not an image")
    data[:] = b"nothing"
    refused("not an image: 7 bytes")
    assert ak.HostImage.collect_garbage(folder) == ["bad"]


def test_pages_that_cannot_be_locked_are_shared_unlocked(folder: Path, stub_cuda: StubCuda) -> None:
    device = FaultyDevice(ak.Device("cuda:0", library=stub_cuda.path))
    device.fail_call(1, call="host_register", code=719, persistent=True)
    image = ak.HostImage.allocate(10, device=device, shared=True, directory=folder)
    assert not image.pinned
    assert image.pin_error
    assert "code 719" in image.pin_error
    image.seal()
    image.publish("x")
    opened = ak.HostImage.open_shared("x", device=device, directory=folder)
    assert not opened.pinned
    device.reset()
    assert ak.HostImage.open_shared("x", device=device, directory=folder).pinned
    del image, opened
    assert device.live == {}


def test_more_than_there_is_is_out_of_memory(folder: Path) -> None:
    with pytest.raises(ak.OutOfMemory) as caught:
        ak.HostImage.allocate(1 << 45, shared=True, directory=folder)
    assert caught.value.bytes == 1 << 45


# ---- several processes -------------------------------------------------------------------------


def test_another_process_opens_what_one_has_published(folder: Path, peers: list[Peer]) -> None:
    image = make(folder, size=CHUNK + 9)
    image.publish()
    reader = peers[0]
    assert reader.do("image = open('qwen')") == "done"
    assert reader.do("image.metadata['model'], image.layout_json") == "('qwen', b'[0]')"
    assert reader.do("sum(image.checksums())") == str(sum(image.checksums()))
    assert image.leased
    assert reader.do("image = None") == "done"
    assert not image.leased
    image.unpublish()
    assert reader.do("open('qwen')").startswith("FileNotFoundError")


def test_a_killed_reader_has_no_lease(folder: Path, peers: list[Peer]) -> None:
    image = make(folder)
    image.publish()
    peers[0].do("image = open('qwen')")
    peers[1].do("image = open('qwen')")
    assert image.leased
    peers[0].kill()
    assert image.leased
    peers[1].kill()
    assert not image.leased


def test_a_publisher_killed_before_it_publishes_leaves_nothing(
    folder: Path, peers: list[Peer]
) -> None:
    used = shm_used(folder)
    peers[0].do("image = make('qwen', 5 << 20)")
    assert shm_used(folder) >= used + 5 * MIB
    peers[0].kill()
    assert list(folder.iterdir()) == []
    assert shm_used(folder) <= used + MIB


def test_the_name_of_a_killed_publisher_is_garbage(folder: Path, peers: list[Peer]) -> None:
    peers[0].do("image = make('old'); image.publish()")
    image = make(folder, name="new")
    image.publish()
    peers[0].kill()
    assert ak.HostImage.published(folder) == ["new", "old"]
    assert ak.HostImage.collect_garbage(folder) == ["old"]
    assert ak.HostImage.published(folder) == ["new"]


def test_the_next_publisher_takes_the_name_of_a_killed_one(folder: Path, peers: list[Peer]) -> None:
    peers[0].do("image = make('qwen', value=1); image.publish()")
    image = make(folder)
    with pytest.raises(ak.LifecycleError, match="a living image in"):
        image.publish()
    peers[0].kill()
    image.publish()
    assert_bitwise_equal(
        memoryview(ak.HostImage.open_shared("qwen", directory=folder)), pattern(1000, seed=1)
    )


def test_readers_keep_the_name_of_a_killed_publisher(folder: Path, peers: list[Peer]) -> None:
    peers[0].do("image = make('qwen', value=9); image.publish()")
    image = ak.HostImage.open_shared("qwen", directory=folder)
    peers[0].kill()
    assert ak.HostImage.collect_garbage(folder) == []
    assert peers[1].do("image = open('qwen'); value = bytes(image)[0]") == "done"
    assert peers[1].do("value") == "9"
    assert bytes(image) == b"\x09" * 1000
    del image
    gc.collect()
    assert ak.HostImage.collect_garbage(folder) == []
    peers[1].do("image = None")
    assert ak.HostImage.collect_garbage(folder) == ["qwen"]


def test_one_of_many_that_publish_at_once_wins(folder: Path, peers: list[Peer]) -> None:
    """Round after round, with a dead publisher's name in the way in every second one."""
    for round_idx in range(40):
        if round_idx % 2:
            dead = run_program(
                "import os, signal, sys\nfrom pathlib import Path\n"
                "(Path(sys.argv[1]) / 'x.image').write_bytes(b'left')\n"
                "os.kill(os.getpid(), signal.SIGKILL)",
                str(folder),
            )
            assert dead.returncode == -signal.SIGKILL
        for value, peer in enumerate(peers):
            peer.do(f"image = make('x', value={value})")
        for peer in peers:
            peer.tell("image.publish()")
        answers = [peer.answer() for peer in peers]
        assert sorted(answers)[0].startswith("LifecycleError: publish of image 'x': a living")
        assert sorted(answers)[1] == "None"
        winner = answers.index("None")
        opened = ak.HostImage.open_shared("x", directory=folder)
        assert bytes(opened) == bytes([winner]) * 1000
        del opened
        for peer in peers:
            peer.do("image = None")
        assert list(folder.iterdir()) == []


def test_readers_and_collectors_never_meet_half_an_image(
    folder: Path, tmp_path: Path, peers: list[Peer]
) -> None:
    """A publisher that comes and goes, a collector that never rests, a reader in between."""
    stop = tmp_path / "stop"
    assert (
        peers[0].do("def publish(i): image = make('x', value=i % 256); image.publish()") == "done"
    )
    peers[0].tell(f"while not os.path.exists({str(stop)!r}): publish(1)")
    peers[1].tell(f"while not os.path.exists({str(stop)!r}): ak.HostImage.collect_garbage(folder)")
    num_seen = 0
    while num_seen < 300:
        try:
            image = ak.HostImage.open_shared("x", directory=folder)
        except FileNotFoundError:
            continue
        num_seen += 1
        assert bytes(image) == b"\1" * 1000
        del image
    stop.touch()
    for peer in peers:
        assert peer.answer() == "done"


def test_a_child_of_fork_shares_the_lease_and_leaves_the_name(folder: Path) -> None:
    program = """
import gc, os, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(100, shared=True, directory=sys.argv[1], name="x")
image.seal()
image.publish()
opened = ak.HostImage.open_shared("x", directory=sys.argv[1])
if os.fork() == 0:
    del image, opened
    gc.collect()
    os._exit(0)
os.wait()
assert ak.HostImage.published(sys.argv[1]) == ["x"], "the child has taken the name"
ready, go = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(go[1])
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os._exit(0)
os.read(ready[0], 1)
del opened
gc.collect()
print(image.leased)
os.close(go[1])
os.wait()
print(image.leased)
"""
    result = run_program(program, str(folder))
    assert result.stdout == "True\nFalse\n", result.stderr


def test_a_write_to_a_published_image_ends_the_writer(folder: Path) -> None:
    program = """
import ctypes, sys
import numpy as np
import aegaeon_kernels as ak
image = ak.HostImage.allocate(100, shared=True, directory=sys.argv[1], name="x")
early = np.frombuffer(image, np.uint8)
image.seal()
image.publish()
if sys.argv[2] == "reader":
    image = ak.HostImage.open_shared("x", directory=sys.argv[1])
    ctypes.c_uint8.from_address(image.address).value = 1
else:
    early[0] = 1
"""
    for who in ("reader", "publisher"):
        assert run_program(program, str(folder), who).returncode == -signal.SIGSEGV
        assert ak.HostImage.collect_garbage(folder) == ["x"]


def test_another_user_finds_a_closed_door(folder: Path) -> None:
    image = make(folder)
    image.publish()
    program = """
import os, sys
import aegaeon_kernels as ak
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try:
        ak.HostImage.open_shared("qwen", directory=sys.argv[1])
    except PermissionError:
        print("refused")
else:
    print("refused")  # there is nobody to become
"""
    assert run_program(program, str(folder)).stdout == "refused\n"


def test_a_thousand_images_leave_nothing_behind(folder: Path) -> None:
    used, mappings = shm_used(folder), Path("/proc/self/maps").read_text().count("\n")
    for i in range(1000):
        image = make(folder, name="x", size=5000)
        image.publish(f"x{i % 3}")
        opened = ak.HostImage.open_shared(f"x{i % 3}", directory=folder)
        del image, opened
    gc.collect()
    assert shm_used(folder) <= used + MIB
    assert Path("/proc/self/maps").read_text().count("\n") <= mappings + 2
