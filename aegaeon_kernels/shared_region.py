"""SharedRegion: a region's memory in another process. SharedHandles: what crosses the border.

This module knows descriptors and unix sockets; not how the memory came into the region.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Self

from aegaeon_kernels import _C
from aegaeon_kernels._closing import ClosedOnExit
from aegaeon_kernels.views import MemoryViews

if TYPE_CHECKING:
    from aegaeon_kernels.arena import Device, Region

_MAGIC = b"AGSH0001"
_MOST_LAYOUT_BYTES = 16 << 20
_FDS_PER_MESSAGE = 128  # Linux takes 253


class SharedHandles(ClosedOnExit):
    """Descriptors of the memory of a region, and where in it they lie.

    Made by Region.export_handles(), or in the other process by receive(). Where they were made they
    also hold the region: its memory may not go to another owner while somebody else maps it. So
    close them when the other process says that it is done, or is gone; until then Region.unmap()
    and close() refuse. Closing received ones closes descriptors and nothing else.

    A context manager: leaving it closes it.
    """

    def __init__(
        self,
        device_kind: str,
        size_bytes: int,
        handles: list[tuple[int, int, int]],
        hold: _C.Hold | None = None,
    ) -> None:
        self.device_kind = device_kind
        self.size_bytes = size_bytes
        self._handles = handles
        self._hold = hold

    @classmethod
    def _of(cls, region: Region) -> Self:
        hold = region._region.hold("its handles are exported to another process")
        try:
            handles = region._region.export_handles()
        except BaseException:
            hold.end()
            raise
        return cls(region.arena.device.kind, region.size_bytes, handles, hold)

    @property
    def fds(self) -> list[int]:
        return [fd for fd, _, _ in self._handles]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where in the region each descriptor's memory lies: (offset_bytes, size_bytes)."""
        return [(offset, size) for _, offset, size in self._handles]

    def send(self, channel: socket.socket) -> None:
        """Send all of it over a unix stream socket, to receive(). May be done several times.

        Raises OSError.
        """
        layout = {
            "device_kind": self.device_kind,
            "size_bytes": self.size_bytes,
            "ranges": self.ranges,
        }
        text = json.dumps(layout).encode()
        channel.sendall(_MAGIC + struct.pack("<I", len(text)) + text)
        fds = self.fds
        for first in range(0, len(fds), _FDS_PER_MESSAGE):
            socket.send_fds(channel, [b"\0"], fds[first : first + _FDS_PER_MESSAGE])

    @classmethod
    def receive(cls, channel: socket.socket) -> Self:
        """What send() has sent from the other side, with descriptors of our own.

        Raises EOFError (the other side is gone), ValueError (it has sent something else), OSError.
        """
        magic, size = struct.unpack("<8sI", _receive_exactly(channel, 12))
        if magic != _MAGIC or size > _MOST_LAYOUT_BYTES:
            raise ValueError("what was received is not SharedHandles")
        kind, size_bytes, ranges = _parse_layout(_receive_exactly(channel, size))
        fds: list[int] = []
        try:
            while len(fds) < len(ranges):
                wanted = min(_FDS_PER_MESSAGE, len(ranges) - len(fds))
                data, new, _, _ = socket.recv_fds(channel, 1, wanted, socket.MSG_CMSG_CLOEXEC)
                fds += new
                if not data:
                    raise EOFError("the other side closed the socket before all handles came")
                if len(new) != wanted:
                    raise ValueError(f"{len(new)} descriptors came where {wanted} were expected")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        handles = [(fd, *place) for fd, place in zip(fds, ranges, strict=True)]
        return cls(kind, size_bytes, handles)

    def close(self) -> None:
        """Close the descriptors; where they were made, let the region go. May be called again."""
        for fd in self.fds:
            os.close(fd)
        self._handles = []
        if self._hold is not None:
            self._hold.end()
            self._hold = None

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.device_kind!r}, size_bytes={self.size_bytes}, "
            f"{len(self._handles)} descriptors)"
        )


def _receive_exactly(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            raise EOFError("the other side closed the socket before all handles came")
        data += part
    return data


def _parse_layout(text: bytes) -> tuple[str, int, list[tuple[int, int]]]:
    """Whether the numbers make sense is the native module's question. Raises ValueError."""

    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    layout = json.loads(text)
    match layout:
        case {"device_kind": str(kind), "size_bytes": size_bytes, "ranges": list(ranges)} if (
            is_size(size_bytes)
            and all(
                isinstance(place, list) and len(place) == 2 and all(map(is_size, place))
                for place in ranges
            )
        ):
            return kind, size_bytes, [(offset, size) for offset, size in ranges]
    raise ValueError(f"not the layout of SharedHandles: {text[:200]!r}")


class SharedRegion(ClosedOnExit, MemoryViews):
    """The memory of a region of another process, at an address of this one.

    The same bytes, at once visible on both sides; who may write when is for the two to agree on. It
    counts as memory of the process that exported it, and lives on here when that is gone. Its
    parts are mapped where they were mapped when they were exported.

    Made by open(). A context manager: leaving it closes it, like Region.
    """

    def __init__(self, device: Device, native: _C.SharedRegion) -> None:
        self.device = device
        self._region = native

    @classmethod
    def open(cls, device: Device, handles: SharedHandles, *, read_only: bool = True) -> Self:
        """Map all of the handles, or nothing. They can be closed afterwards.

        device: the same one, of this process. read_only: writing through it is a fault.
        Raises ValueError (another kind of device; handles that do not fit), DriverError.
        """
        if handles.device_kind != device.kind:
            raise ValueError(
                f"the handles are of a {handles.device_kind} device; {device.name} cannot map them"
            )
        native = _C.SharedRegion(
            device._driver,
            size_bytes=handles.size_bytes,
            handles=handles._handles,
            read_only=read_only,
        )
        return cls(device, native)

    @property
    def _native(self) -> _C.SharedRegion:
        return self._region

    @property
    def _driver(self) -> _C.Driver:
        return self.device._driver

    @property
    def read_only(self) -> bool:
        return self._region.read_only

    def close(self, *, abandon_views: bool = False) -> None:
        """Unmap it and give the address range up. Does nothing when closed already.

        The caller makes sure that the device is done with it. abandon_views: see Region.close().
        Raises LifecycleError (views are alive), DriverError: then there are no new views, and
        close() may be called again.
        """
        self._region.close(abandon_views=abandon_views)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.device.name!r}, address={self.address:#x}, "
            f"size_bytes={self.size_bytes}, read_only={self.read_only})"
        )
