"""A report as blocks, written as Markdown beside its plots, and as one HTML page that needs nothing else."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

_CODE = re.compile(r"`([^`]*)`")
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.5rem 4rem; background: #fff; color: #111;
  font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", "Noto Sans KR", "Apple SD Gothic Neo", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #bbb; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
nav { margin: 1rem 0; } nav a { margin-right: 1.1rem; white-space: nowrap; } a { color: #0b4f8a; }
p { max-width: 48rem; } code { font-size: .92em; background: #f3f3f3; padding: 0 .2em; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { border-bottom: 1px solid #111; font-weight: 600; vertical-align: bottom; }
td.short { white-space: nowrap; }
td.yes { font-weight: 600; color: #006b3c; } td.no { font-weight: 600; color: #a33c00; } td.open { color: #666; }
figure { margin: 1rem 0 1.4rem; } figure svg { max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #444; max-width: 44rem; }
@page { size: A4; margin: 14mm; }
@media print { body { max-width: none; padding: 0; font-size: 9.5pt; } nav { display: none; }
  table { font-size: 7pt; } td.short { white-space: normal; } .wide { overflow: visible; }
  h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; } figure svg { width: 150mm; } a { color: inherit; text-decoration: none; } }
"""
_SHORT, _FEW = 24, 9  # letters of a cell that stays on one line of a screen, in a table of so many columns
# A cell that says just this is told apart by colour and weight too.
VERDICTS = {"reproduced": "yes", "not reproduced": "no", "not run": "open"}


@dataclass(frozen=True)
class Table:
    """Cells are plain text; `between backticks` it is code."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure: the name of its file, its SVG, and what it shows."""

    file: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Listing:
    """Plain texts, one below the other."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """What the blocks up to the next one are of."""

    text: str


Block = Table | Plot | Listing | Heading | str


@dataclass(frozen=True)
class Section:
    """A title and what stands below it."""

    title: str
    blocks: Sequence[Block]


def markdown(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown, without an end of line at its end; plots are links to their files."""
    return "\n\n".join(map(_markdown, blocks))


def markdown_page(title: str, sections: Sequence[Section]) -> str:
    """A whole report as Markdown."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts += [f"## {section.title}"] if section.title else []
        parts.append(markdown(section.blocks))
    return "\n\n".join(parts) + "\n"


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The same as one HTML page with its plots in it."""
    named = [section.title for section in sections if section.title]
    links = "\n".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name in named)
    body = "\n".join(_html_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<nav>
{links}
</nav>
{body}
</body>
</html>
"""


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return _plain(block)
    if isinstance(block, Heading):
        return f"### {_plain(block.text)}"
    if isinstance(block, Listing):
        return "\n".join(f"- {_plain(text)}" for text in block.lines)
    if isinstance(block, Plot):
        return f"![{_plain(block.caption)}]({block.file})"
    lines = [block.head, *block.rows]
    cells = ["|" + "".join(f" {_cell(text)} |" if text else " |" for text in row) for row in lines]
    return "\n".join([cells[0], f"|{'---|' * len(block.head)}", *cells[1:]])


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """A text on one line in which nothing but code between backticks is Markdown or HTML."""
    pieces = _CODE.split(" ".join(text.split()))
    written = [
        f"`{piece}`" if number % 2 else re.sub(r"[*<\[\]\\`]", r"\\\g<0>", piece)
        for number, piece in enumerate(pieces)
    ]
    return "".join(written)


def _html_section(section: Section) -> str:
    head = f'<h2 id="{_anchor(section.title)}">{html.escape(section.title)}</h2>\n' if section.title else ""
    return f"<section>\n{head}{'\n'.join(map(_html, section.blocks))}\n</section>"


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{_inline(block)}</p>"
    if isinstance(block, Heading):
        return f"<h3>{_inline(block.text)}</h3>"
    if isinstance(block, Listing):
        return f"<ul>{''.join(f'<li>{_inline(text)}</li>' for text in block.lines)}</ul>"
    if isinstance(block, Plot):
        return f"<figure>{_own_names(block)}<figcaption>{_inline(block.caption)}</figcaption></figure>"
    head = "".join(f"<th>{_inline(text)}</th>" for text in block.head)
    few = len(block.head) <= _FEW
    rows = "\n".join(f"<tr>{''.join(_html_cell(text, few) for text in row)}</tr>" for row in block.rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _html_cell(text: str, few: bool) -> str:
    kinds = [VERDICTS[text]] if text in VERDICTS else []
    kinds += ["short"] if few and len(text) <= _SHORT else []
    return f"<td{f' class="{" ".join(kinds)}"' if kinds else ''}>{_inline(text)}</td>"


def _inline(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", html.escape(text, quote=False))


def _own_names(plot: Plot) -> str:
    """The SVG alone, with names that no other plot of the page has."""
    start = f"{_anchor(plot.file)}-"
    drawn = plot.svg[plot.svg.index("<svg") :].rstrip()
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{start}", drawn)


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
