"""The commands of README and docs, as their code blocks and inline code have them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SHELLS = ("sh", "bash")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*|short=.*", re.DOTALL)
_PROGRAMS = ("cherry", "make", "bash", "sh", "sbatch", "torchrun", "python", "lm_eval")


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        page: where it stands.
        words: program and arguments.
        environment: assignments before it.
        whole: as it is to be typed (a code block), or spoken of (inline code), where arguments may be left out.
    """

    page: str
    words: tuple[str, ...]
    environment: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join([*self.environment, *self.words])}"


def commands() -> list[Command]:
    """All of all pages, in order."""
    return [command for page in PAGES for command in commands_of(page.name, page.read_text(encoding="utf-8"))]


def commands_of(name: str, text: str) -> Iterator[Command]:
    """Those of one page."""
    for language, block in _FENCE.findall(text):
        if language in SHELLS:
            variables: dict[str, str] = {}
            for line in block.replace("\\\n", " ").splitlines():
                yield from _of_line(name, line, variables)
    for code in _INLINE.findall(_FENCE.sub("", text)):
        words = code.split()
        environment = [word for word in words if _ASSIGNMENT.fullmatch(word) and word.split("=")[0].isupper()]
        rest = words[len(environment) :]
        if words[: len(environment)] == environment and len(rest) > 1 and rest[0] in _PROGRAMS:
            yield Command(name, tuple(rest), tuple(environment), whole=False)


def _of_line(page: str, line: str, variables: dict[str, str]) -> Iterator[Command]:
    for name, value in variables.items():
        line = line.replace(f"${name}", value)
    words = shlex.split(line, comments=True)
    if len(words) == 1 and "=" in words[0]:
        name, _, value = words[0].partition("=")
        variables[name] = value
        return
    if words[:1] == ["for"]:  # for x in ...; do COMMAND; done
        words = words[words.index("do") + 1 :]
        words = [word.removesuffix(";") for word in words if word != "done"]
    environment = []
    while words and _ASSIGNMENT.fullmatch(words[0]):
        environment.append(words.pop(0))
    if words:
        yield Command(page, tuple(words), tuple(environment), whole=True)


def paths() -> Iterator[tuple[str, str]]:
    """(page, path) of each file of the repository that inline code names."""
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for code in _INLINE.findall(text):
            for word in code.split():
                if re.fullmatch(r"(tests|tools|slurm|configs|benchmarks|cherry_megatron)/[\w./-]+\.\w+", word):
                    yield page.name, word
