"""The open requests of one model, and their sum, kept up to date instead of built anew.

Both the step loop and the simulator keep one per model. A model that has not run since the last
decision costs nothing; one that ran is summed up once, when its `work` is asked for.
"""

import math
from collections.abc import Iterable

from aegaeon.sched.scheduler import NO_WORK, RequestView, Work


class _Open:
    """One request; what a step changes is changed in place."""

    __slots__ = ("context", "due", "view")

    def __init__(self, view: RequestView) -> None:
        self.view = view
        self.due = view.due_s
        self.context = view.prompt_tokens + view.tokens_done


class OpenRequests:
    """Requests in order of arrival (the order of `add`), waiting ones apart from decoding ones."""

    __slots__ = ("_decoding", "_waiting", "_work")

    def __init__(self) -> None:
        self._waiting: dict[str, _Open] = {}
        self._decoding: dict[str, _Open] = {}
        self._work: Work | None = NO_WORK

    def __len__(self) -> int:
        return len(self._waiting) + len(self._decoding)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting or request_id in self._decoding

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_decoding(self) -> int:
        return len(self._decoding)

    @property
    def waiting_ids(self) -> Iterable[str]:
        """Oldest first."""
        return self._waiting.keys()

    @property
    def decoding_ids(self) -> Iterable[str]:
        """In the order in which they were prefilled."""
        return self._decoding.keys()

    def add(self, request: RequestView) -> None:
        """Take in a request. Raises ValueError for an id that is open."""
        if request.id in self:
            raise ValueError(f"the request {request.id!r} is already open")
        (self._decoding if request.prefilled else self._waiting)[request.id] = _Open(request)
        self._work = None

    def prefilled(self, request_id: str, *, tokens: int = 1) -> None:
        """Its prompt is computed, which made `tokens` output tokens."""
        opened = self._waiting.pop(request_id)
        self._decoding[request_id] = opened
        self._advance(opened, tokens)

    def decoded(self, request_id: str, *, tokens: int = 1) -> None:
        """A decoding request got `tokens` more output tokens."""
        self._advance(self._decoding[request_id], tokens)

    def decoded_all(self, *, tokens: int = 1) -> None:
        """Each decoding request got `tokens` more output tokens."""
        for opened in self._decoding.values():
            self._advance(opened, tokens)

    def preempted(self, request_id: str) -> None:
        """Its prompt is to be computed again; the tokens it has stay."""
        opened = self._decoding.pop(request_id)
        self._waiting = {request_id: opened, **self._waiting}
        self._work = None

    def remove(self, request_id: str) -> None:
        """It has ended, one way or another."""
        if self._waiting.pop(request_id, None) is None:
            del self._decoding[request_id]
        self._work = None

    def due_s(self, request_id: str) -> float:
        """When its next token is due."""
        opened = self._waiting.get(request_id) or self._decoding[request_id]
        return opened.due

    @property
    def work(self) -> Work:
        if self._work is None:
            self._work = self._sum_up()
        return self._work

    def _advance(self, opened: _Open, tokens: int) -> None:
        opened.due += tokens * opened.view.tpot_s
        opened.context += tokens
        self._work = None

    def _sum_up(self) -> Work:
        if not self:
            return NO_WORK
        oldest = oldest_waiting = tpot = math.inf
        prefill_tokens = context_tokens = first_prompt = 0
        priority: int | None = None
        for opened in self._waiting.values():
            view = opened.view
            first_prompt = first_prompt or opened.context
            prefill_tokens += opened.context
            oldest_waiting = min(oldest_waiting, view.arrival_s)
            tpot = min(tpot, view.tpot_s)
            priority = view.priority if priority is None else min(priority, view.priority)
        for opened in self._decoding.values():
            view = opened.view
            context_tokens += opened.context
            oldest = min(oldest, view.arrival_s)
            tpot = min(tpot, view.tpot_s)
            priority = view.priority if priority is None else min(priority, view.priority)
        assert priority is not None
        return Work(
            oldest_arrival_s=min(oldest, oldest_waiting),
            oldest_waiting_s=oldest_waiting,
            first_dues_s=tuple(sorted(opened.due for opened in self._waiting.values())),
            next_dues_s=tuple(sorted(opened.due for opened in self._decoding.values())),
            tpot_s=tpot,
            priority=priority,
            first_prompt_tokens=first_prompt,
            prefill_tokens=prefill_tokens,
            context_tokens=context_tokens,
        )
