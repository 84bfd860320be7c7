"""Images between processes: who keeps them, and what a killed one leaves.

The other processes here are real ones, and they die by SIGKILL.
"""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest
from kernel_support import MIB, pattern, run_program
from shared_image_support import Peer, make, shm_used

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import assert_bitwise_equal

CHUNK = _C.IMAGE_CHUNK_BYTES


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
