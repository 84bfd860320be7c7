"""How a context manager over memory is left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from aegaeon_kernels.errors import LifecycleError


class ClosedOnExit(ABC):
    """Leaving the block closes it.

    While an error is on its way, a refusal becomes a note on it and does not replace it: the
    error's traceback may hold the very views that close() refuses for; the memory goes with the
    last of them.
    """

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except LifecycleError as refusal:
            if error is None:
                raise
            error.add_note(f"not closed: {refusal}")
