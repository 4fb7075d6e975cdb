"""OUTPUT.parts/: a data set that grows part by part, and goes into place when it is whole.

It holds the tokens (already what Megatron's .bin holds), the lengths of the documents, for conversations the
marks of the answers, and a journal that says up to where these are whole and where in the input to go on.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cherry_megatron.data.marks import ANSWERS, Marks, fingerprint, marks_prefix, write_index, write_marks
from cherry_megatron.data.tokenizer import Counts, Encoded
from cherry_megatron.data.verify import hashes
from cherry_megatron.errors import CherryError

# What is moved into place at the end, in this order; there are no answers where the input is plain text.
MOVES = {
    "tokens.bin": ".bin",
    "report": ".json",
    **{f"tokens.{ANSWERS}{suffix}": f".{ANSWERS}{suffix}" for suffix in (".bin", ".json", ".idx")},
    "tokens.idx": ".idx",
}
READ_BYTES = 1 << 24  # of marks, at a time


@dataclass(frozen=True)
class Position:
    """A place in the input: a file, and how many of its chunks lie before."""

    file: int = 0
    chunks: int = 0


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """OUTPUT.parts, for this process alone."""
    folder = Path(f"{output}.parts")
    lock = folder / "lock"
    taken = CherryError(f"another run is writing {output}; wait for its end or choose another --output")
    if not (folder / "journal").exists():
        _refuse_existing(output, MOVES.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise CherryError(f"cannot write {folder}: {error.strerror}") from None
    with file:
        try:
            # The system gives it back when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except OSError as error:
            raise CherryError(f"cannot lock {lock}: {error.strerror}; choose an --output elsewhere") from None
        # A run that ended between the two steps above has removed the file.
        if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
            raise taken
        yield folder


def _refuse_existing(output: Path, suffixes: Iterable[str]) -> None:
    for suffix in suffixes:
        if Path(f"{output}{suffix}").exists():
            raise CherryError(f"{output}{suffix} exists; remove it or choose another --output")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CherryError(
            f"cannot write {folder}: {error.strerror}; mend that and run the same command again to go on"
        ) from None


class Parts:
    """What is written so far, and the journal. Nothing beyond the journal's sizes is ever used.

    Args:
        output: path prefix of the data set.
        folder: OUTPUT.parts.
        identity: of what the data set follows from; parts of another identity are thrown away.
        dtype: of the tokens.
        answers: whether answers are marked.
    """

    def __init__(
        self, output: Path, folder: Path, identity: str, dtype: np.dtype[Any], answers: bool = False
    ) -> None:
        self._output = output
        self._folder = folder
        self._identity = identity
        self.dtype = dtype
        self._streams = ("tokens.bin", "lengths", *(["answers"] if answers else []))
        journal = self._read_journal()
        self.finished: bool = journal.get("finished", False)
        self.counts = Counts(**journal.get("counts", {}))
        self.position = Position(**journal.get("position", {}))
        self._sizes: dict[str, int] = journal.get("sizes", dict.fromkeys(self._streams, 0))
        self._pending: list[Encoded] = []
        self.unsaved = 0  # bytes of text that the journal does not know of yet
        # A run that was cut off while it moved its files has moved some of them already.
        moved = [suffix for name, suffix in MOVES.items() if self.finished and not (folder / name).exists()]
        _refuse_existing(output, [suffix for suffix in MOVES.values() if suffix not in moved])
        if not journal:
            # Before anything is written over what an older journal speaks of.
            with _writing(folder):
                (folder / "journal").unlink(missing_ok=True)

    def _read_journal(self) -> dict[str, Any]:
        try:
            journal: dict[str, Any] = json.loads((self._folder / "journal").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        if journal["identity"] != self._identity:
            return {}
        # Not even the disk's loss of a file may let a run go on from nothing.
        whole = journal["finished"] or all(
            (self._folder / name).exists() and (self._folder / name).stat().st_size >= size
            for name, size in journal["sizes"].items()
        )
        return journal if whole else {}

    def append(self, encoded: Encoded, position: Position) -> None:
        self._pending.append(encoded)
        self.unsaved += encoded.counts.bytes
        self.counts.add(encoded.counts)
        self.position = position

    def save(self) -> None:
        """Write what was appended, then the journal."""
        with _writing(self._folder):
            for name in self._streams:
                self._extend(name, [encoded.streams[name] for encoded in self._pending])
            self._write_journal()
        self._pending.clear()
        self.unsaved = 0

    def _extend(self, name: str, contents: list[bytes]) -> None:
        with (self._folder / name).open("ab") as file:
            file.truncate(self._sizes[name])
            file.writelines(contents)
            self._sizes[name] += sum(map(len, contents))
            _to_disk(file)

    def _write_journal(self, finished: bool = False) -> None:
        content = {
            "identity": self._identity,
            "finished": finished,
            "sizes": self._sizes,
            "counts": asdict(self.counts),
            "position": asdict(self.position),
        }
        temporary = self._folder / "journal.new"
        with temporary.open("w") as file:
            json.dump(content, file)
            _to_disk(file)
        temporary.replace(self._folder / "journal")

    def write_index(self) -> None:
        """Write Megatron's index, and what it is needed for: marks tell which tokens they belong to."""
        with _writing(self._folder):
            lengths = np.fromfile(self._folder / "lengths", np.int32)
            write_index(self._folder / "tokens.idx", lengths, self.dtype)
            if "answers" in self._streams:
                self._write_answers(lengths)

    def _write_answers(self, lengths: np.ndarray[Any, Any]) -> None:
        tokens = self._folder / "tokens"
        Path(f"{marks_prefix(tokens, ANSWERS)}.idx").unlink(missing_ok=True)  # of a run that was killed here
        marks = Marks(
            ANSWERS,
            "answers",
            "1",
            self.counts.tokens,
            self.counts.tokens,
            self.counts.answers,
            fingerprint(tokens),
        )
        with (self._folder / "answers").open("rb") as file:
            parts = (np.frombuffer(part, np.uint8) for part in iter(partial(file.read, READ_BYTES), b""))
            write_marks(tokens, marks, lengths, parts)

    def finish(self, report: dict[str, Any]) -> dict[str, Any]:
        """Mark the parts as finished, then publish them, with hashes in the report."""
        with _writing(self._folder):
            report = {**report, "sha256": hashes(self._folder / "tokens")}
            # A file name that is no UTF-8 becomes an escape that JSON knows.
            with (self._folder / "report").open("w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(report, file, indent=1, ensure_ascii=False)
                _to_disk(file)
            self._write_journal(finished=True)
        return self.publish()

    def publish(self) -> dict[str, Any]:
        """Move the finished files into place, remove the rest, and return the report."""
        with _writing(self._folder):
            for name, suffix in MOVES.items():
                if (self._folder / name).exists():
                    (self._folder / name).replace(f"{self._output}{suffix}")
            report: dict[str, Any] = json.loads(Path(f"{self._output}.json").read_text(encoding="utf-8"))
            for name in (*self._streams[1:], "journal", "lock"):
                (self._folder / name).unlink(missing_ok=True)
        # Not empty if another run has just made its lock there, to be told that the output exists.
        with suppress(OSError):
            self._folder.rmdir()
        return report


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
