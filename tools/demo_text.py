"""The demo's text: the Korean sentences of a package's documentation, a JSON line a page.

usage: demo_text.py FILE

Headings, tables, code and the targets of links are left out: so small a model would learn little else.
"""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from cherry_megatron.files import write_atomically

PACKAGE, PAGES = "portone_mcp_server", "resources/docs/opi/ko"
SENTENCE = re.compile(r"[^<>{}|=]*[가-힣](다|요)\.")  # which polite Korean ends with
LINK, MARKS = re.compile(r"\[([^]]*)\]\([^)]*\)"), re.compile(r"^[-*\d. ]+|[][`*\\]")


def sentences(page: str) -> list[str]:
    """The lines that are sentences, without marks of Markdown."""
    lines = (MARKS.sub("", LINK.sub(r"\1", line.strip())) for line in page.splitlines() if "http" not in line)
    return [line for line in lines if SENTENCE.match(line)]


def main() -> None:
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None, f"{PACKAGE} is not installed; run make setup"
    paths = sorted((Path(spec.origin).parent / PAGES).rglob("*.md"))
    pages = [sentences(path.read_text(encoding="utf-8")) for path in paths]
    text = [json.dumps({"text": "\n".join(page)}, ensure_ascii=False) for page in pages if page]
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
