"""PREFIX.NAME.parts/: an array of each piece of the data set in a file of its own, whole or not there.

A run that is killed leaves what it has; the same selection goes on from it, whatever its --rho and --workers.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cherry_megatron.data.marks import marks_prefix, refuse_existing
from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write, locked_folder, write_atomically
from cherry_megatron.sgt.selection.tokens import Piece
from cherry_megatron.workers import worker_processes

LAYOUT = 1  # of the folder, so that another version of the program does not go on from it
IDENTITY = "made-from.json"
SCORES = "scores"


@dataclass(frozen=True)
class Scratch:
    """The folder. A worker process can be given it."""

    folder: Path

    def path(self, piece: Piece, kind: str) -> Path:
        """Where an array of a piece is, once it is whole."""
        return self.folder / f"{piece.number:06}.{kind}.npy"

    def read(self, piece: Piece, kind: str) -> np.ndarray[Any, Any]:
        """An array of a piece, mapped into memory."""
        array: np.ndarray[Any, Any] = np.load(self.path(piece, kind), mmap_mode="r")
        return array

    def write(self, piece: Piece, kind: str, array: np.ndarray[Any, Any]) -> None:
        """Keep an array of a piece.

        Raises:
            CherryError: if it cannot be written.
        """
        self.write_file(self.path(piece, kind), array)

    def write_file(self, path: Path, array: np.ndarray[Any, Any]) -> None:
        """Keep an array in a file of the folder."""
        try:
            temporary = path.with_suffix(".new")
            with temporary.open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise cannot_write(path, error) from None

    def missing(self, pieces: list[Piece], kind: str) -> list[Piece]:
        """The pieces that have no such array yet."""
        return [piece for piece in pieces if not self.path(piece, kind).exists()]

    def share_out(
        self,
        pieces: list[Piece],
        kind: str,
        workers: int,
        prepare: Callable[..., Callable[[Piece], None]],
        *arguments: Any,
    ) -> int:
        """Have worker processes write an array of every piece that has none.

        Args:
            pieces: of the data set.
            kind: of the array.
            workers: processes.
            prepare: called once in each with `arguments`, returns what writes the array of a piece.

        Returns:
            The number of tokens in these pieces.
        """
        missing = self.missing(pieces, kind)
        tokens = sum(piece.tokens for piece in missing)
        if not missing:
            return 0
        with (
            tqdm(total=tokens, unit="tokens", unit_scale=True, desc=kind, disable=None) as bar,
            worker_processes(min(workers, len(missing)), prepare, *arguments) as submit,
        ):
            running = {submit(piece): piece for piece in missing}
            for done in as_completed(running):
                done.result()
                bar.update(running[done].tokens)
        return tokens


@contextmanager
def open_scratch(prefix: Path, name: str, made_from: dict[str, Any]) -> Iterator[Scratch]:
    """The folder of a selection, for this process alone; removed if the block ends without an error.

    Args:
        prefix: of the tokens.
        name: of the marks.
        made_from: what the arrays follow from; those made from anything else are thrown away.

    Raises:
        CherryError: if another run is at it, the marks exist, or it cannot be written.
    """
    target = marks_prefix(prefix, name)
    folder = Path(f"{target}.parts")
    if not folder.exists():
        refuse_existing(target)
    busy = f"another run is writing {target}; wait for its end or give the marks another --name"
    with locked_folder(folder, busy, busy):
        try:
            refuse_existing(target)
        except CherryError:
            shutil.rmtree(folder)  # of a run that was killed after the marks were whole
            raise
        try:
            _begin(folder, {"layout": LAYOUT, **made_from})
        except OSError as error:
            raise cannot_write(folder, error) from None
        yield Scratch(folder)
        shutil.rmtree(folder)


def _begin(folder: Path, made_from: dict[str, Any]) -> None:
    """Throw away what was made from something else, or is half written."""
    said = json.dumps(made_from, sort_keys=True)
    identity = folder / IDENTITY
    if not identity.exists() or identity.read_text(encoding="utf-8") != said:
        identity.unlink(missing_ok=True)  # first: the rest is of no use without it
        for left in folder.iterdir():
            left.unlink()
        write_atomically(identity, said)
    for left in folder.glob("*.new"):
        left.unlink()
