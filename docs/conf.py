"""The documentation site, by Sphinx: `make docs`.

Its source is the repository itself, so that pages and their links are the same here and on a forge. Added while
building is what a forge has no use for: the navigation, and a page of API reference for each room of the package.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from cherry_megatron.monitor.console import hide_warnings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cherry_megatron"
REFERENCE = "docs/reference"

# In the order in which somebody who trains a model needs them.
NAVIGATION = {
    "Start": [
        "docs/install",
        "docs/configuration",
        "docs/data",
        "docs/checkpoints",
        "docs/monitoring",
        "docs/report",
        "docs/generation",
        "docs/evaluation",
        "docs/hugging_face",
    ],
    "The method": [
        "docs/paper",
        "docs/recurrence",
        "docs/depth",
        "docs/moee",
        "docs/mtp",
        "docs/sgt",
        "docs/evidence",
    ],
    "At scale": [
        "docs/parallelism",
        "docs/planner",
        "docs/slurm",
        "docs/operations",
        "docs/performance",
        "docs/experiments",
    ],
    "Reference": [f"{REFERENCE}/index", "benchmarks/results/README"],
    "The project": ["docs/log", "CHANGELOG", "CONTRIBUTING"],
}

# Rooms of the reference: modules beside the packages by subject, what is not named here under `training`.
BESIDE = {
    "config": (
        "config", "sections", "rules", "section_rules", "expert_rules", "flags", "yaml_files", "checks", "errors",
    ),
    "verbs": ("cli",),
    "storage": ("checkpoints", "loading", "keeping", "files", "shares"),
}  # fmt: skip
ROOMS = {
    "config": "YAML to typed values, and what a file may not say",
    "data": "Text and conversations to tokens, marks of tokens, batches",
    "model": "The recurrent stack and what stands on it",
    "training": "One training: the wiring, a step, and what is around it",
    "sgt": "Selective supervision",
    "surgery": "Checkpoint to checkpoint, without torch",
    "inference": "Prompts to continuations",
    "harness": "Tasks of lm-evaluation-harness",
    "huggingface": "The modelling code that goes with weights",
    "monitor": "What a run shows and keeps",
    "storage": "Checkpoints on disk",
    "jobs": "A cluster's jobs",
    "experiments": "Stages and seeds of one file",
    "report": "Runs and records on one page",
    "planner": "What a configuration costs, before it runs",
    "platform": "CPU or GPU, Transformer Engine or local layers, and what is patched",
    "verbs": "The command line",
}

hide_warnings()  # of the libraries that the modules import
logging.getLogger("megatron.core").setLevel(logging.WARNING)

project = "cherry_megatron"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "benchmarks/results/**"]
exclude_patterns = [".*", "runs", "build", "dist"]

html_theme = "furo"
html_title = "cherry_megatron"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 4  # named as forges name them
default_role = "code"  # docstrings are read as they stand, with single backticks
smartquotes = False  # `--` is an option
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_attr_annotations = False  # the signature has them
napoleon_use_rtype = False  # what stands before a colon there need not be a type
autodoc_inherit_docstrings = False  # torch's
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!cherry_megatron).*")]  # other libraries' names have no page here


def modules_of(room: str) -> list[str]:
    """The public modules of a room, by their full names."""
    beside = {path.stem for path in PACKAGE.glob("[!_]*.py")}
    named = [name for names in BESIDE.values() for name in names]
    names = [name for name in BESIDE.get(room, ()) if name in beside]
    if room == "training":
        names = sorted(beside.difference(named))
    for path in sorted((PACKAGE / room).rglob("[!_]*.py")):
        names.append(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    return [f"cherry_megatron.{name}" for name in names]


def write_reference(app: Sphinx) -> None:
    """Write a page for each room; what has not changed keeps its time, so that it is not read again."""
    folder = ROOT / REFERENCE
    folder.mkdir(exist_ok=True)
    pages = {"index": _index(), **{room: _page(room) for room in ROOMS}}
    for old in folder.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _index() -> str:
    rooms = "".join(f"   {title} <{room}>\n" for room, title in ROOMS.items())
    return f"API reference\n=============\n\nBy room of the package.\n\n.. toctree::\n   :maxdepth: 1\n\n{rooms}"


def _page(room: str) -> str:
    title = f"{room}: {ROOMS[room][0].lower()}{ROOMS[room][1:]}"
    text = [title, "=" * len(title), ""]
    for module in modules_of(room):
        name = module.removeprefix("cherry_megatron.")
        text += [name, "-" * len(name), "", f".. automodule:: {module}", "   :members:", ""]
    return "\n".join(text)


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Append what a forge would show as code: the order of the pages."""
    if page == "README":
        source[0] += "".join(_toctree(pages, caption) for caption, pages in NAVIGATION.items())
    elif page == "benchmarks/results/README":
        source[0] += _toctree(["*", "*/README", "*/table"])


def _toctree(pages: list[str], caption: str | None = None) -> str:
    options = f":caption: {caption}\n:hidden:\n" if caption else ":glob:\n:reversed:\n:titlesonly:\n"
    lines = "\n".join(f"/{page}" if caption else page for page in pages)
    return f"\n\n```{{toctree}}\n{options}\n{lines}\n```\n"


def skip_fields(app: Sphinx, kind: str, name: str, member: object, skip: bool, options: Any) -> bool | None:
    """The fields of a NamedTuple are described by its own docstring; Python's say `Alias for field number 0`."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def copy_front_page(app: Sphinx, error: Exception | None) -> None:
    """A server shows index.html; the README lies in the same folder, so its links hold there too."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write_reference)
    app.connect("source-read", add_navigation)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("build-finished", copy_front_page)
    return {"parallel_read_safe": True}
