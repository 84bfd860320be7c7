"""`aegaeon top`: the running server on one screen, live. Needs textual, which is optional."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

from rich.console import RenderableType
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, Static

from aegaeon.server import tables
from aegaeon.server.admin_client import AdminError
from aegaeon.server.history import History

# A server that is gone may be started again.
RETRY_S = 1.0

Events = Callable[[], AsyncIterator[tuple[str, Any]]]


class Top(App[None]):
    """events: what `AdminClient.events` gives, with the timeline; asked for again after an end."""

    TITLE = "aegaeon top"
    CSS = """
    Static { height: auto; margin: 0 1; }
    #problem { color: $error; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("q", "quit", "Quit"), ("p", "pause", "Pause")]

    def __init__(self, events: Events) -> None:
        super().__init__()
        self._events = events
        self.history = History()
        self.paused = False

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            for part in ("problem", "headline", "models", "timeline", "switches", "memory"):
                yield Static("", id=part)
        yield Footer()

    def on_mount(self) -> None:
        self.run_worker(self._listen(), exclusive=True)

    def on_resize(self) -> None:
        self._draw()

    def action_pause(self) -> None:
        """Leave what is on the screen as it is, or go on."""
        self.paused = not self.paused
        self._tell("paused: p goes on" if self.paused else "")
        self._draw()

    async def _listen(self) -> None:
        while True:
            try:
                async for event, data in self._events():
                    if event == "snapshot":
                        self.history.add(data)
                        self._tell("")
                        self._draw()
                    else:
                        self._tell(data["message"])
            except AdminError as error:
                self._tell(str(error))
            await asyncio.sleep(RETRY_S)

    def _tell(self, problem: str) -> None:
        if not self.paused or problem.startswith("paused"):
            self._show("problem", problem)

    def _draw(self) -> None:
        history, width = self.history, self.size.width - 4
        if history.state is None or self.paused:
            return
        self._show("headline", tables.headline(history.state))
        self._show("models", tables.objectives_table(history))
        self._show("timeline", tables.timeline(history, width=width))
        self._show("switches", tables.switches_table(history.state))
        self._show("memory", tables.memory(history.state, width=width))

    def _show(self, part: str, content: RenderableType) -> None:
        self.query_one(f"#{part}", Static).update(content)
