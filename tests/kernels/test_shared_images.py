"""Images that processes share by name: who sees them, and for how long."""

from __future__ import annotations

import gc
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from kernel_support import MIB, StubCuda, pattern
from shared_image_support import make, shm_used

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

CHUNK = _C.IMAGE_CHUNK_BYTES


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
