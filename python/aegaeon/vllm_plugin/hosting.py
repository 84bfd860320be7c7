"""Says to a worker that is being built where its model goes.

vLLM builds workers deep inside its own constructors; a context variable reaches them there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from aegaeon.core.errors import AegaeonError
from aegaeon.switching.image_cache import ImageCache
from aegaeon.switching.switcher import Switcher


class Hosting(NamedTuple):
    """Where a worker that is being built puts its model."""

    switcher: Switcher
    model: str
    image_cache: ImageCache | None


_hosting: ContextVar[Hosting | None] = ContextVar("hosting", default=None)


@contextmanager
def hosting(
    switcher: Switcher,
    model: str,
    *,
    pinned: bool = False,
    image_cache: ImageCache | None = None,
) -> Iterator[None]:
    """An engine built inside places its model in `switcher`'s arena as `model`, from an image of
    `image_cache` if that has one.

    Adds the model to the switcher, and removes it again when the block raises. From the beginning
    vLLM's process-wide state belongs to the new model: its constructors seed generators and
    replace workspaces, which must not be taken for those of the model that ran last.
    """
    switcher.add_model(model, pinned=pinned)
    switcher.make_current(model)
    token = _hosting.set(Hosting(switcher, model, image_cache))
    try:
        yield
    except BaseException:
        switcher.remove_model(model)
        raise
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
