"""The Grafana board asks only for metrics and labels that are documented."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs"
BOARD = json.loads((DOCS / "grafana-dashboard.json").read_text())
ROW = re.compile(r"^\| `(aegaeon_\w+)` \| (\w+) \| (.*?) \|", re.MULTILINE)
METRIC = re.compile(r"\b((?:aegaeon_|vllm:)\w+)(?:\{([^}]*)\})?")


def documented() -> dict[str, set[str]]:
    """Every series name of the documented metrics, with its labels."""
    names: dict[str, set[str]] = {}
    for name, kind, labels in ROW.findall((DOCS / "observability.md").read_text()):
        known = set(re.findall(r"`(\w+)`", labels))
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {name + suffix: known | ({"le"} if suffix else set()) for suffix in suffixes}
    return names


def expressions() -> Iterator[str]:
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def test_every_metric_of_ours_is_documented_with_the_labels_that_are_asked_for():
    known, seen = documented(), set()
    for expression in expressions():
        for name, selector in METRIC.findall(expression):
            if name.startswith("aegaeon_"):
                assert name in known, expression
                assert set(re.findall(r"(\w+)=", selector)) <= known[name], expression
                seen.add(name)
        for grouping in re.findall(r"by \(([^)]*)\)", expression):
            wanted = {label.strip() for label in grouping.split(",")}
            ours = [known[name] for name, _ in METRIC.findall(expression) if name in known]
            assert all(wanted <= labels for labels in ours), expression
    assert len(seen) >= 12


def test_metrics_of_vllm_are_named_in_the_documentation():
    text = (DOCS / "observability.md").read_text()
    names = {name for each in expressions() for name, _ in METRIC.findall(each)}
    foreign = {name.removesuffix("_bucket") for name in names if name.startswith("vllm:")}
    assert foreign
    assert all(f"`{name}`" in text for name in foreign)


def test_the_board_is_one_that_grafana_can_import():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids) >= 12
    for panel in BOARD["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["datasource"]["uid"] == "${datasource}"
        legends = " ".join(target["legendFormat"] for target in panel["targets"])
        assert legends.count("{{") == legends.count("}}")
    corners = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in BOARD["panels"]]
    assert len(set(corners)) == len(corners)
