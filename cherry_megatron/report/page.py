"""`cherry report`: one page of what runs and experiments have found, as HTML and as Markdown."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write, make_folder, write_atomically
from cherry_megatron.monitor.document import Block, Heading, Plot, Section, html_page, markdown_page
from cherry_megatron.report import sections
from cherry_megatron.report.claims import claims
from cherry_megatron.report.sources import Source, read_sources
from cherry_megatron.sgt.report import comparison

HTML, MARKDOWN = "report.html", "report.md"
_PARTS: dict[str, Callable[[Source, Sequence[str] | None], list[Block]]] = {
    "Stages": sections.stages,
    "Lineage": sections.lineage,
    "Losses": sections.losses,
    "Parameters and FLOPs": sections.sizes,
    "Loops": sections.loops,
    "Selective supervision": sections.selective,
    "Experts": sections.experts,
    "Multi-token prediction": sections.multi_token,
    "Speed": sections.speed,
    "Health": sections.health,
    "Generated texts": sections.generations,
}


def report(paths: Sequence[Path], plotted: Sequence[str] | None = None) -> tuple[str, list[Section]]:
    """The title and the sections of a report.

    Args:
        paths: folders of runs, and records of experiments, see `read_sources`.
        plotted: the trainings in the plots of curves, by name; by default all, or of more than ten those with most
            seeds.

    Raises:
        CherryError: bad input.
    """
    sources = read_sources(paths)
    known = [name for source in sources for row in source.rows for name in {row.name: None, row.label: None}]
    for name in plotted or ():
        if name not in known:
            raise CherryError(
                f"--plot {name}: there is no such training; those are {', '.join(dict.fromkeys(known))}"
            )
    found = [Section("", sections.about(sources)), Section("Claims of the paper", claims(sources))]
    for title, part in _PARTS.items():
        blocks: list[Block] = []
        for source in sources:
            if made := part(source, plotted):
                blocks += [Heading(source.name), *_named(made, source)] if len(sources) > 1 else made
        if blocks:
            found.append(Section(title, blocks))
    return f"Report of {', '.join(source.name for source in sources)}", found


def _named(blocks: Sequence[Block], source: Source) -> list[Block]:
    """The same with file names that no other source's plots have."""
    start = re.sub(r"[^\w.-]+", "-", source.name)
    return [
        Plot(f"{start}-{block.file}", block.svg, block.caption) if isinstance(block, Plot) else block
        for block in blocks
    ]


def selective_report(folders: Sequence[Path]) -> tuple[str, list[Section]]:
    """The same of selective runs and the full ones that they pair with alone; what does not pair is refused."""
    return "Selective runs", [Section("", comparison(folders))]


def write(out: Path, title: str, found: Sequence[Section]) -> list[Path]:
    """Write a report into a folder: the page, the same as Markdown, its plots.

    Raises:
        CherryError: if it cannot be written.
    """
    plots = {block.file: block.svg for section in found for block in section.blocks if isinstance(block, Plot)}
    files = {**plots, MARKDOWN: markdown_page(title, found), HTML: html_page(title, found)}
    make_folder(out)
    try:
        for name, text in files.items():
            write_atomically(out / name, text)
    except OSError as error:
        raise cannot_write(out, error) from None
    return [out / HTML, out / MARKDOWN, *(out / name for name in plots)]
