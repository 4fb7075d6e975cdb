"""The documentation site: strictly built, whole, and alone."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page links to, loads and has anchors for, and the links of its navigation."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {""}
        self.navigation: set[str] = set()
        self._path = path
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors.add(found.get("id", ""))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
            if "reference internal" in found.get("class", "") and "#" not in found["href"]:
                self.navigation.add(found["href"])
        if tag in LOADED and LOADED[tag] in found:
            self.loaded.append(found[LOADED[tag]])


def build(site: Path, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, to another place."""
    (line,) = (line for line in (source / "Makefile").read_text().splitlines() if "-m sphinx" in line)
    command = line.replace("$(PY)", sys.executable).replace("build/site", str(site)).split()
    command += ["-d", str(site.with_name("doctrees"))]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if "_modules" not in path.parts}


@pytest.mark.full
def test_every_page_is_in_the_navigation(site, pages):
    front = pages[site / "index.html"]
    written = {f"docs/{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert written and written <= front.navigation


@pytest.mark.full
def test_every_public_module_is_in_the_reference(site):
    there = {
        module
        for page in (site / "docs/reference").glob("*.html")
        for module in re.findall(r'id="module-([\w.]+)"', page.read_text(encoding="utf-8"))
    }
    public = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "cherry_megatron").rglob("[!_]*.py")
    }
    assert there == public


@pytest.mark.full
def test_docstrings_are_in_the_reference(site):
    text = re.sub(r"<[^>]+>", "", (site / "docs/reference/storage.html").read_text(encoding="utf-8"))
    assert "Replace a file's content at once." in text and "if it cannot be made." in text


@pytest.mark.full
def test_every_link_inside_the_site_leads_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            place, _, anchor = link.partition("#")
            target = (path.parent / place.partition("?")[0]).resolve() if place else path
            if re.match(r"\w+:", link):
                continue
            if not target.is_file() or (target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


@pytest.mark.full
def test_nothing_is_loaded_from_elsewhere(site, pages):
    loaded = [file for page in pages.values() for file in page.loaded]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert loaded and not [file for file in loaded if re.match(r"\w+:|//", file)]
    assert not re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)]*", styles)


@pytest.mark.full
def test_the_search_finds_korean_and_english_words(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert '"docs/generation"' in index and json.dumps("대한민국의") in index and "megatron" in index


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as they are, without a module to make a reference of, which takes a minute."""
    folder = tmp_path_factory.mktemp("copied")
    for name in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("reference"))
    for path in (*ROOT.glob("*.md"), ROOT / "Makefile"):
        shutil.copy(path, folder)
    (folder / "cherry_megatron").mkdir()
    return folder


def test_the_pages_are_right_and_what_leads_nowhere_fails_the_build(copied):
    (copied / "docs/lost.md").write_text("# Lost\n")
    wrong = {
        "[there](nowhere.md)": "nowhere.md",
        "[there](sgt.md#no-such-part)": "no-such-part",
        "[there](../benchmarks/results/none.md)": "none.md",
        "{py:func}`cherry_megatron.config.none`": "cherry_megatron.config.none",
    }
    with (copied / "docs/data.md").open("a") as page:
        page.write("\n\n" + "\n\n".join(wrong))
    done = build(copied / "site", copied)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    says = [*(f"docs/data.md.*{what}" for what in wrong.values()), "docs/lost.md.*isn't included in any toctree"]
    assert len(told) == len(says), done.stderr  # nothing is wrong with the others
    assert all(any(re.search(what, line) for line in told) for what in says), done.stderr
