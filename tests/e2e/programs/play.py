"""Plays a script of requests to one vLLM engine, by the engine's own steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from aegaeon.vllm_plugin.request_form import answer_of, params_of, prompt_of


class Player:
    """engine: vLLM's in-process LLMEngine. Call `due` before each step and `took` after it."""

    def __init__(self, engine: Any, requests: Sequence[Mapping[str, Any]]) -> None:
        self._engine = engine
        self._arrivals = sorted(requests, key=lambda request: request["at"])
        self._aborts: list[tuple[int, str]] = []
        self._open: set[str] = set()
        self._step = 0
        self.outputs: dict[str, Any] = {}
        self.aborted = 0

    @property
    def done(self) -> bool:
        return not self._arrivals and not self._open

    def due(self) -> None:
        """Let everything happen whose step has come; while nothing is open, time jumps ahead."""
        if not self._open and self._arrivals:
            self._step = max(self._step, self._arrivals[0]["at"])
        for at, request_id in list(self._aborts):
            if at <= self._step:
                self._aborts.remove((at, request_id))
                if request_id in self._open:
                    self._engine.abort_request([request_id])
                    self._open.remove(request_id)
                    self.aborted += 1
        while self._arrivals and self._arrivals[0]["at"] <= self._step:
            request = self._arrivals.pop(0)
            self._engine.add_request(request["id"], prompt_of(request), params_of(request))
            self._open.add(request["id"])
            if request["abort_at"] is not None:
                self._aborts.append((request["abort_at"], request["id"]))

    def took(self, outputs: Sequence[Any]) -> None:
        self._step += 1
        for output in outputs:
            self.outputs[output.request_id] = output
            if output.finished:
                self._open.discard(output.request_id)

    def answers(self) -> dict[str, Any]:
        """What each request had been answered when it ended, or was aborted."""
        return {name: answer_of(output) for name, output in sorted(self.outputs.items())}
