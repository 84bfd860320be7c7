"""How a context manager over memory is left."""

from __future__ import annotations

from collections.abc import Callable

from aegaeon_kernels.errors import LifecycleError


def close_after(error: BaseException | None, close: Callable[[], None]) -> None:
    """Close. While an error is on its way, a refusal becomes a note on it and does not replace it.

    The error's traceback may hold the very views that close() refuses for; the memory goes with
    the last of them.
    """
    try:
        close()
    except LifecycleError as refusal:
        if error is None:
            raise
        error.add_note(f"not closed: {refusal}")
