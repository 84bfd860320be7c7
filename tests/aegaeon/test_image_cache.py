"""Weights images on disk: whole or not there, bounded, never a reason to fail."""

import os

import pytest

import aegaeon_kernels as ak
from aegaeon.switching.image_cache import ImageCache

SIZE = 3 << 20


@pytest.fixture
def device():
    return ak.Device("host", memory_bytes=64 << 20)


def make_image(device: ak.Device, value: int) -> ak.HostImage:
    image = ak.HostImage.allocate(SIZE, device=device)
    image.tensor().fill_(value)
    image.layout_json = b'{"value": %d}' % value
    image.seal()
    return image


def values(image: ak.HostImage | None) -> set[int] | None:
    return None if image is None else set(bytes(memoryview(image)))


def test_a_saved_image_comes_back_with_its_layout(tmp_path, device):
    cache = ImageCache(tmp_path / "made" / "on demand", 1 << 30)
    assert cache.open("a", "k1", device=device) is None
    assert cache.save("a", "k1", make_image(device, 7))
    image = cache.open("a", "k1", device=device)
    assert values(image) == {7}
    assert image is not None
    assert image.layout_json == b'{"value": 7}'
    assert image.sealed
    assert cache.open("a", "k2", device=device) is None
    assert cache.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_image_is_removed_not_used(tmp_path, device, damage, caplog):
    cache = ImageCache(tmp_path, 1 << 30)
    cache.save("a", "k", make_image(device, 7))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[SIZE // 2] ^= 1
    else:
        del content[-9:]
    path.write_bytes(content)
    assert cache.open("a", "k", device=device) is None
    assert "damaged" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_images_make_room(tmp_path, device):
    cache = ImageCache(tmp_path, 3 * (SIZE + (1 << 16)))
    for number, key in enumerate(("k0", "k1", "k2")):
        cache.save("a", key, make_image(device, number))
        os.utime(cache._path("a", key), (number, number))
    assert cache.open("a", "k0", device=device) is not None  # used now
    cache.save("a", "k3", make_image(device, 3))
    held = [values(cache.open("a", key, device=device)) for key in ("k0", "k1", "k2", "k3")]
    assert held == [{0}, None, {2}, {3}]


def test_an_image_larger_than_the_cache_is_not_kept_and_nothing_leaves_for_it(tmp_path, device):
    big = ImageCache(tmp_path, 1 << 30)
    big.save("a", "k", make_image(device, 1))
    assert not ImageCache(tmp_path, SIZE - 1).save("b", "k", make_image(device, 2))
    assert big.open("a", "k", device=device) is not None


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, device, caplog):
    (tmp_path / "file").write_text("")
    cache = ImageCache(tmp_path / "file", 1 << 30)
    assert not cache.save("a", "k", make_image(device, 1))
    assert cache.open("a", "k", device=device) is None
    cache.remove("a", "k")
    assert "not cached" in caplog.text


def test_names_never_become_paths(tmp_path, device):
    cache = ImageCache(tmp_path / "cache", 1 << 30)
    cache.save("../../x/..", "k", make_image(device, 1))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["_.._x_..-k.image"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
