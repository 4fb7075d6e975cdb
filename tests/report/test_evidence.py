"""docs/evidence.md says what the kept records say."""

import re
from pathlib import Path

from cherry_megatron.monitor.document import markdown
from cherry_megatron.report.claims import claims
from cherry_megatron.report.sources import read_sources

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_records():
    page = (ROOT / "docs/evidence.md").read_text()
    (command,) = re.findall(r"cherry report .*?--out", page, flags=re.S)
    sources = read_sources([ROOT / path for path in re.findall(r"\S+records\.jsonl", command)])
    generated = markdown([claims(sources)[0]])
    rows = [line for line in generated.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert [line for line in page.splitlines() if line.startswith("|")] == rows
