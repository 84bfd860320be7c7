"""The table of metrics in the documentation names all that our own collectors export.

Quick and without vLLM; tests/e2e/test_observability.py compares it with a real server, labels
included.
"""

import re
from pathlib import Path

from admin_support import SmallInstance
from prometheus_client.parser import text_string_to_metric_families

from aegaeon.server.metrics import FrontMetrics

DOCS = Path(__file__).parent.parent.parent / "docs"
ROW = re.compile(r"^\| `(aegaeon_\w+)` \| (\w+) \|", re.MULTILINE)


def test_every_metric_is_documented_with_its_type_and_every_documented_one_exists():
    instance = SmallInstance()
    instance.work(a=2, b=2)
    text = FrontMetrics("abc", lambda model: 0).exposition() + instance.metrics.exposition()
    exported = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }
    documented = dict(ROW.findall((DOCS / "observability.md").read_text()))
    assert documented == exported
