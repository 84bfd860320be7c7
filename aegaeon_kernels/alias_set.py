"""AliasSet: one slot of memory at the addresses of several owners, of whom one has it at a time.

This module knows owners' names and addresses, not what is stored in the slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegaeon_kernels import _C
from aegaeon_kernels._closing import ClosedOnExit
from aegaeon_kernels.contents import Contents, native_contents

if TYPE_CHECKING:
    from aegaeon_kernels.arena import Arena, Region


class AliasSet(ClosedOnExit):
    """Regions of equal size that share one slot of memory, each mapped at its own address.

    Made by Arena.alias_set(). The slot belongs to one owner, in the arena's books too; give() makes
    it another's, without a driver call. Arrays may be made over any of the regions, once and for
    all; only the owner's may be touched. Copies and transfers on the other regions are refused,
    but nothing stops a stray access through a pointer, unless debug is on: then only the owner's
    region is mapped, and give() unmaps and maps.

    The regions do without map(), unmap(), protect() and close(): what they need, this does. Each
    of them keeps all that it lies on. A context manager: leaving it closes it, like Region.
    """

    def __init__(self, arena: Arena, native: _C.AliasSet) -> None:
        self.arena = arena
        self._set = native

    def region(self, owner: str) -> Region:
        """The region of that owner. Raises ValueError for a name that is none of them."""
        return self.arena._region_of(self._set.region(owner))

    @property
    def owner(self) -> str:
        """Who has the slot."""
        return self._set.owner()

    def give(self, owner: str, *, contents: Contents = "zero") -> None:
        """From now on the slot is that owner's; nothing happens when it is already.

        Waits for the work that the old owner's region has recorded, and for no other.
        contents: what the new owner sees, see Region.map(): "zero" by default, so nothing of the
                  old one's; "preserve" is the caller's promise to overwrite all that is read, as a
                  load of weights does, and makes this a matter of bookkeeping only.
        Raises ValueError (none of the owners), OutOfMemory (the owner's maximum), LifecycleError
        (closed; the old owner's region is held, or a transfer on it is in flight), DriverError: the
        slot is the old owner's as before, with its bytes but for what `lost_contents` names.
        """
        self._set.give(owner, contents=native_contents(contents))

    def close(self, *, abandon_views: bool = False) -> None:
        """Close all its regions and give the slot back. Does nothing when closed already.

        Raises what Region.close() does; after a DriverError nothing can be given any more, and
        close() may be called again.
        """
        self._set.close(abandon_views=abandon_views)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.arena!r}, owner={self.owner!r})"
