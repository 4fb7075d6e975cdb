"""`cherry evaluate --hf`: the harness' tasks put to a model in Hugging Face's form by the harness' own `hf` model.

Megatron is not imported, and its CPU platform not put in force: transformers runs as it is.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from cherry_megatron.errors import CherryError
from cherry_megatron.harness.asking import Asked, keep, loaded_tasks, put
from cherry_megatron.storage.ancestry import verify_whole
from cherry_megatron.storage.lineage import MANIFEST
from cherry_megatron.storage.weights import Weights

BATCH = 8  # texts at once


def evaluate_hf(folder: Path, asked: Asked) -> Path:
    """Put tasks to a model in Hugging Face's form by the harness' own `hf` model; keep the scores in its folder.

    Code that is shipped with the weights is run.

    Raises:
        CherryError: if it is no such model, or not what its manifest says was saved, or if a task or its data are
            not there.
    """
    if not (folder / "config.json").is_file():
        why = "holds no config.json" if folder.exists() else "does not exist"
        raise CherryError(f"--hf {folder} {why}; name a folder with a model in Hugging Face's form")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CherryError("--hf runs as one process; start it without torchrun or srun")
    if (folder / MANIFEST).is_file():
        verify_whole(Weights(folder))
    with loaded_tasks(asked) as tasks:
        try:
            lm = HFLM(pretrained=_opened(folder), tokenizer=_tokenizer(folder), batch_size=BATCH)
        except CherryError:
            raise
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CherryError(f"--hf {folder} cannot be opened: {why}; write the folder anew") from None
        with tempfile.TemporaryFile("w") as log:
            found, seconds = put(lm, tasks, asked, True, log)
        model = {"checkpoint": str(folder.absolute()), "seconds": seconds}
        return keep(folder, model, asked, found, print)


def _opened(folder: Path) -> Any:
    """The model with every weight from its files.

    Raises:
        CherryError: if some are not there, which transformers would draw at random, or are of no use.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    for kind, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has no use for"),
        ("mismatched_keys", "finds"),
    ):
        if found := sorted(map(str, info.get(kind) or ())):
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise CherryError(
                f"--hf {folder}: the model of its config.json {what} {found[0]}{others}"
                f"{' of another shape' if kind == 'mismatched_keys' else ''}; its files are of another model"
            )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
