"""Write a page about data, and a summary for a terminal, from the counts of `lingua.data.inspect`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingua.data.quality import BOILERPLATE_DOCUMENTS, BOILERPLATE_SHARE, LOOKED_AT_BYTES
from lingua.files import human_bytes, plural
from lingua.report.page import render, write

BOILERPLATE = f"in at least {BOILERPLATE_SHARE:.0%} of the documents, and in {BOILERPLATE_DOCUMENTS} or more"


def write_data_page(facts: Mapping[str, Any], file: Path) -> None:
    """Write the page. Raises RunError."""
    page = render(
        "report/templates/data.html",
        title=Path(facts["path"]).name,
        facts=facts,
        sample=sample(facts["quality"]),
        boilerplate=BOILERPLATE,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    write(file, page, "choose another place with --page FILE")


def sample(quality: Mapping[str, Any]) -> str:
    """Describe the sample that some figures are computed from; empty if it is all of the text."""
    n_bytes, n = quality["looked_at"]["text_bytes"], quality["looked_at"]["documents"]
    return "" if n_bytes < LOOKED_AT_BYTES else f"of the first {human_bytes(n_bytes)} ({plural(n, 'document')})"


def quality_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return a few facts for a terminal, by name."""
    quality, of_sample = facts["quality"], f"; {sample(facts['quality'])}".rstrip("; ")
    twice = quality["duplicates"]
    low, half, high = (human_bytes(quality[f"{n}_bytes"]) for n in ("percentile_10", "median", "percentile_90"))
    scripts = ", ".join(f"{name} {share:.1%}" for name, share in quality["scripts"].items() if share >= 0.0005)
    odd = ", ".join(f"{count:,} {kind}" for kind, count in quality["odd_characters"].items())
    where = plural(quality["documents_with_odd_characters"], "document")
    return {
        "lengths": f"half up to {half}; 10% up to {low}, 90% up to {high}",
        "exact duplicates": f"{twice:,} ({twice / facts['documents']:.1%} of the documents)",
        "scripts of letters": (scripts or "-") + of_sample,
        "odd characters": f"{odd or 'none'}, in {where}{of_sample}",
        "boilerplate lines": f"{quality['boilerplate_share_of_lines']:.1%}, {BOILERPLATE}{of_sample}",
    }
