"""What `aegaeon ps` and `top` print of an instance's state."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from aegaeon.core.config import format_bytes


def models_table(state: Mapping[str, Any]) -> Table:
    """One row per model: state, requests, what it holds of the device."""
    table = Table("", "model", "state", "running", "waiting", "device memory", box=None)
    for column in table.columns[3:]:
        column.justify = "right"
    for model in state["models"]:
        mapped = sum(unit["mapped_bytes"] for unit in model["units"])
        size = sum(unit["size_bytes"] for unit in model["units"])
        table.add_row(
            "▶" if model["name"] == state["current"] else "",
            model["name"],
            model["state"] + (", pinned" if model["pinned"] else ""),
            str(model["running"]),
            str(model["waiting"]),
            f"{format_bytes(mapped)} of {format_bytes(size)}",
        )
    return table
