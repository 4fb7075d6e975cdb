"""Activations that `cherry calibrate` recorded: what its folder holds, and reading it.

layer-000-0-attention.npy   what the output projection takes, [tokens, heads * head size]: the heads' outputs
layer-000-1-mlp.npy         what the second linear layer takes, [tokens, ffn]: the neurons, gated
calibration.json            checkpoint, number of tokens, text, and the SHA-256 of each file's values

A name is the stored layer, the place of the sublayer in it, and its kind. Row t is the same token in every file;
values are float16. A calibration's identity is the SHA-256 of its calibration.json.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cherry_megatron.errors import CherryError
from cherry_megatron.model.pattern import ATTENTION, MLP
from cherry_megatron.storage.checkpoint import Checkpoint, hash_values
from cherry_megatron.storage.layers import ROLES, Source
from cherry_megatron.storage.lineage import Manifest, identity
from cherry_megatron.storage.records import Array

CALIBRATION = "calibration.json"
FORMAT = 1
KINDS = {ATTENTION: "attention", MLP: "mlp"}


def file_name(layer: int, place: int, symbol: str) -> str:
    """The file of a sublayer."""
    return f"layer-{layer:03}-{place}-{KINDS[symbol]}.npy"


def calibration_text(
    checkpoint: Path, manifest: Manifest | None, layers: int, tokens: int, data: list[str], files: dict[str, str]
) -> str:
    """The content of calibration.json.

    Args:
        checkpoint: the folder of the checkpoint that was run.
        manifest: its manifest, or None: then only sizes tell whether a calibration fits.
        layers: number of stored layers.
        tokens: rows of every file.
        data: path prefixes of the text.
        files: SHA-256 of the values of each file.
    """
    content = {
        "format": FORMAT,
        "checkpoint": str(checkpoint),
        "identity": None if manifest is None else identity(manifest),
        "layers": layers,
        "tokens": tokens,
        "data": data,
        "files": files,
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class Calibration:
    """A folder of recorded activations.

    Attributes:
        folder: it.
        identity: its own.
        checkpoint: path of the checkpoint that was run.
        source: that checkpoint's identity, or None if it had no manifest.
        layers, tokens, data, files: as in `calibration_text`.
    """

    folder: Path
    identity: str
    checkpoint: str
    source: str | None
    layers: int
    tokens: int
    data: tuple[str, ...]
    files: dict[str, str]

    def record(self) -> dict[str, Any]:
        """What a checkpoint's lineage says of it."""
        return {
            "path": str(self.folder.absolute()),
            "identity": self.identity,
            "checkpoint": self.source,
            "tokens": self.tokens,
            "data": list(self.data),
        }

    def check(self, source: Checkpoint, layers: Source) -> None:
        """See that it was recorded from a checkpoint, and that its files are there.

        Raises:
            CherryError: naming what does not fit.
        """
        if self.layers != len(layers.layers):
            raise CherryError(
                f"{self.folder} is of a model of {self.layers} layers, but {source.folder} has "
                f"{len(layers.layers)}; make it with `cherry calibrate` from that"
            )
        for number, sublayers in enumerate(layers.layers):
            for place, sublayer in enumerate(sublayers):
                name = file_name(number, place, sublayer.symbol)
                output = source.tensors[sublayer.names[ROLES[sublayer.symbol][-1]]]
                width = self._map(name).shape[1]
                if width != output.shape[1]:
                    raise CherryError(
                        f"{self.folder / name} has {width} features, but {output.name} of {source.folder} takes "
                        f"{output.shape[1]}; make it with `cherry calibrate` from that"
                    )
        found = None if source.manifest is None else identity(source.manifest)
        if self.source != found:
            raise CherryError(
                f"{self.folder} was recorded from the checkpoint {_short(self.source)} ({self.checkpoint}), but "
                f"{source.folder} is {_short(found)}; make it with `cherry calibrate` from that"
            )

    def read(self, name: str) -> Array:
        """A file's activations in single precision.

        Raises:
            CherryError: if it is not what was recorded.
        """
        values = self._map(name)
        if hash_values(values) != self.files[name]:
            raise CherryError(
                f"{self.folder / name} is not what was recorded (SHA-256); make it anew with `cherry calibrate`"
            )
        return values.astype(np.float32)

    def _map(self, name: str) -> Array:
        path = self.folder / name
        try:
            values: Array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            raise CherryError(f"{path} is missing or damaged; make it anew with `cherry calibrate`") from None
        if name not in self.files or values.dtype != np.float16 or values.ndim != 2 or len(values) != self.tokens:
            raise CherryError(
                f"{path} does not belong to the {CALIBRATION} beside it; make it anew with `cherry calibrate`"
            )
        return values


def open_calibration(folder: Path) -> Calibration:
    """Read a calibration's description.

    Raises:
        CherryError: if there is none, or it is damaged.
    """
    path = folder / CALIBRATION
    try:
        content = path.read_bytes()
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise CherryError(
                f"{path} has the format {found['format']}, not {FORMAT}; make it anew with this version"
            )
        return Calibration(
            folder,
            hashlib.sha256(content).hexdigest(),
            found["checkpoint"],
            found["identity"],
            found["layers"],
            found["tokens"],
            tuple(found["data"]),
            dict(found["files"]),
        )
    except OSError as error:
        raise CherryError(f"{path}: {error.strerror}; name a folder made by `cherry calibrate`") from None
    except (ValueError, KeyError, TypeError):
        raise CherryError(f"{path} is damaged; make it anew with `cherry calibrate`") from None


def _short(found: str | None) -> str:
    return "without a manifest" if found is None else found[:12]
