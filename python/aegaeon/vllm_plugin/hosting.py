"""Says to a worker that is being built where its model goes.

vLLM builds workers deep inside its own constructors; a context variable reaches them there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from aegaeon.core.errors import AegaeonError
from aegaeon.switching.switcher import Switcher


class Hosting(NamedTuple):
    """Where a worker that is being built puts its model."""

    switcher: Switcher
    model: str


_hosting: ContextVar[Hosting | None] = ContextVar("hosting", default=None)


@contextmanager
def hosting(switcher: Switcher, model: str) -> Iterator[None]:
    """Workers built inside place their model in `switcher`'s arena as `model`."""
    token = _hosting.set(Hosting(switcher, model))
    try:
        yield
    finally:
        _hosting.reset(token)


def current_hosting() -> Hosting:
    """The innermost `hosting`. Raises AegaeonError outside of any."""
    place = _hosting.get()
    if place is None:
        raise AegaeonError(
            "this worker class only works inside an aegaeon instance: start the model with "
            "`aegaeon serve` or `aegaeon generate`, not with vLLM's own commands"
        )
    return place
