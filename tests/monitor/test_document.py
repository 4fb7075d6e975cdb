"""A report's Markdown and HTML: the same content, whatever characters it has, and nothing from elsewhere."""

import html
import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.monitor.document import (
    Heading,
    Listing,
    Plot,
    Section,
    Table,
    html_page,
    markdown,
    markdown_page,
)

DRAWN = '<svg id="figure"><defs><path id="m1"/></defs><use href="#m1" clip-path="url(#p1)"/></svg>'
SVG = f'<?xml version="1.0"?>\n{DRAWN}'
BLOCKS = [
    Heading("one"),
    "Some `code` & text.",
    Table(["", "loss"], [["a | b", "1.5 ± 0.1 (3)"], ["*-[*-]x2 <i>", "not run"]]),
    Listing(["first", "second"]),
    Plot("loss.svg", SVG, "Loss."),
]


def test_markdown_by_hand():
    assert markdown_page("A *title*", [Section("", ["Before."]), Section("Part", BLOCKS)]) == (
        "# A \\*title\\*\n\nBefore.\n\n## Part\n\n### one\n\nSome `code` & text.\n\n"
        "| | loss |\n|---|---|\n| a \\| b | 1.5 ± 0.1 (3) |\n| \\*-\\[\\*-\\]x2 \\<i> | not run |\n\n"
        "- first\n- second\n\n![Loss.](loss.svg)\n"
    )


def test_html_by_hand():
    page = html_page("A & B", [Section("Part one", BLOCKS), Section("Other", [Plot("other.svg", SVG, "More.")])])
    assert "<title>A &amp; B</title>" in page and "<h1>A &amp; B</h1>" in page and "<h3>one</h3>" in page
    assert '<a href="#part-one">Part one</a>' in page and '<h2 id="part-one">Part one</h2>' in page
    assert "<p>Some <code>code</code> &amp; text.</p>" in page
    assert '<td class="short">a | b</td>' in page and '<td class="open short">not run</td>' in page
    assert "*-[*-]x2 &lt;i&gt;" in page and "<i>" not in page
    assert "<li>first</li><li>second</li>" in page
    assert "<?xml" not in page and page.count("<svg") == 2
    assert 'href="#loss-svg-m1"' in page and "url(#other-svg-p1)" in page


def test_names_of_plots_do_not_collide():
    page = html_page("", [Section("", [Plot("a.svg", SVG, ""), Plot("b.svg", SVG, "")])])
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names)) == 4
    assert {*re.findall(r'href="#([^"]+)"', page)} <= {*names}


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


ODD = st.text(st.sampled_from("|\\*_<>&#[]()~!\"'-.가a ") | st.characters(codec="utf-8", exclude_characters="`\r"))


@given(st.lists(st.tuples(ODD, ODD), min_size=1, max_size=3))
def test_cells_are_shown_as_they_are(rows):
    page = html_page("", [Section("", [Table(["", "b"], rows)])])
    found = Cells()
    found.feed(page[page.index("<tbody") : page.index("</tbody>")])
    assert found.tags == {"tbody", "tr", "td"}
    assert [cell.rstrip("\n") for cell in found.cells] == [text.rstrip("\n") for row in rows for text in row]


@given(ODD, ODD)
def test_a_row_of_markdown_is_one_line_with_its_cells(one, two):
    from tensorboard.plugin_util import markdown_to_safe_html

    text = markdown([Table(["x", "y"], [["a" + one, "b" + two]])])
    assert len(text.splitlines()) == 3 or "\x85" in one + two
    shown = markdown_to_safe_html(text)
    assert {*re.findall(r"</?(\w+)", shown)} <= {"table", "thead", "tbody", "tr", "th", "td", "a", "em", "strong"}
    cells = re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)
    assert len(cells) == 2 and html.unescape(cells[0]).startswith("a")
