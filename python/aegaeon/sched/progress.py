"""Whether a step loop gets on, as another thread may ask while it hangs."""

from aegaeon.core.clock import Clock


class Progress:
    """Told by the loop what it does; tells how long nothing has come of it.

    Written by the loop's thread, read by others without a lock: each field is one reference.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since: float | None = None
        self.doing = "nothing"

    def begin(self, doing: str) -> None:
        """`doing` begins; it is progress only when `made` says so."""
        self.doing = doing
        if self._since is None:
            self._since = self._clock.now()

    def made(self, now: float | None = None) -> None:
        """Something was achieved: a step has run, a model has been switched in, an order done."""
        self._since = self._clock.now() if now is None else now

    def rest(self) -> None:
        """There is nothing to do."""
        self._since = None
        self.doing = "nothing"

    def stuck_s(self) -> float:
        """Seconds since something was achieved, 0.0 when there is nothing to do."""
        since = self._since
        return 0.0 if since is None else max(0.0, self._clock.now() - since)
