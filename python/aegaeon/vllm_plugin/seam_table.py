"""Writes `docs/vllm.md` from the seam records: `python -m aegaeon.vllm_plugin.seam_table`."""

import sys
from collections import Counter
from pathlib import Path

from aegaeon.vllm_plugin.seam import Seam, Tier
from aegaeon.vllm_plugin.versions import SUPPORTED

HEAD = """# Where we touch vLLM

Generated from the records in `python/aegaeon/vllm_plugin/seams/` by
`python -m aegaeon.vllm_plugin.seam_table`; a test fails when this page is not what it writes.

Supported vLLM: `{supported}`. Before anything is applied, every symbol below is looked up in the
sources of the installed vLLM; when one is missing or has other parameters, nothing is applied and
the message lists all of them. Installed but not enabled (`AEGAEON_ENABLE` unset), the plugin
changes nothing.

{tiers}
"""

TIERS = {
    Tier.DOCUMENTED: "a documented extension point",
    Tier.KNOB: "a setting or class argument that vLLM offers",
    Tier.PRIVATE: "private code; the work is to make these fewer",
}


def render(seams: tuple[Seam, ...]) -> str:
    """The whole page."""
    counts = Counter(seam.tier for seam in seams)
    tiers = "\n".join(f"- **{tier.value}** ({counts[tier]}): {TIERS[tier]}" for tier in Tier)
    sections = [
        f"## {seam.name}\n\n"
        f"*{seam.tier.value}*, {'patched' if seam.apply else 'by subclass or call'}\n\n"
        f"- **Why:** {seam.why}.\n"
        f"- **How:** {seam.how}.\n"
        f"- **Remove when:** {seam.remove_when}.\n"
        f"- **Upstream:** <{seam.upstream_link}>\n"
        f"- **Relies on:** "
        + ", ".join(f"`{up.module}.{up.symbol}`".replace(".`", "`") for up in seam.relies_on)
        + "\n"
        for seam in sorted(seams, key=lambda seam: seam.name)
    ]
    return HEAD.format(supported=SUPPORTED, tiers=tiers) + "\n" + "\n".join(sections)


if __name__ == "__main__":
    from aegaeon.vllm_plugin.seams import SEAMS

    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/vllm.md").write_text(render(SEAMS))
