"""The exceptions of `aegaeon`, and who handles each.

`AegaeonError` is the root of every condition of the world that we raise on purpose. A caller's
mistake is a `ValueError`; an own bug is an assertion. Memory conditions below the engine have their
own root, `aegaeon_kernels.Error`.
"""

from __future__ import annotations

from functools import partial


class AegaeonError(Exception):
    """Root of all below. Handled by the command line: one line on stderr, exit status 1."""


class ConfigError(AegaeonError):
    """A pool file or an environment variable that cannot be used as it stands.

    Handled by the command line before anything is started: printed as it is, exit status 2. The
    message names the file, the key, the value found and the form that is accepted.
    """


class ModelLoadError(AegaeonError):
    """One model could not be loaded: a missing or altered file, or one that vLLM refuses.

    Handled by the launcher, which ends the start and prints it; the message names the model and the
    file.
    """

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"model {model!r} cannot be loaded: {reason}")
        self.model = model
        self.reason = reason

    def __reduce__(self) -> tuple[type[ModelLoadError], tuple[str, str]]:
        return type(self), (self.model, self.reason)


class CapacityError(AegaeonError):
    """What was asked for does not fit; the message says how much was needed and is there.

    At start it is handled by the launcher, which refuses the pool. At run time it is handled by the
    instance's step loop: the model that asked stays where it was, and the scheduler tries another.
    """

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes

    def __reduce__(self) -> tuple[object, ...]:
        rebuild = partial(
            type(self), needed_bytes=self.needed_bytes, available_bytes=self.available_bytes
        )
        return rebuild, (str(self),)


class UnknownModel(AegaeonError):
    """An order names a model that the pool does not have. Handled by the admin listener: 404."""


class OrderRefused(AegaeonError):
    """An order that cannot be carried out as things are: pinned, busy, no room.

    Nothing has changed. Handled by the admin listener: 409, with the reason.
    """


class DeviceLost(AegaeonError):
    """The device does not answer any more, or no model on it can be run.

    Handled by the instance, which reports it to the launcher and ends: only a new process gets a
    new context of the device.
    """


class RestartsExhausted(AegaeonError):
    """The instance died too often. Handled by the command line: the server ends, status 1."""


class InstanceUnavailable(AegaeonError):
    """The instance is being started anew. Handled by the listeners: 503, with a `Retry-After`."""


class InstanceDied(AegaeonError):
    """The engine process ended while requests were open.

    Handled by the supervisor: every open request ends with an error that says so, and a new
    instance is started.
    """

    def __init__(self, instance: str, exit_code: int | None) -> None:
        how = "without an exit status" if exit_code is None else _describe_exit(exit_code)
        super().__init__(f"instance {instance!r} ended {how}")
        self.instance = instance
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[InstanceDied], tuple[str, int | None]]:
        return type(self), (self.instance, self.exit_code)


def _describe_exit(exit_code: int) -> str:
    if exit_code < 0:
        return f"by signal {-exit_code}"
    return f"with status {exit_code}"
