"""`cherry evaluate --hf`: the harness' tasks put to a model in Hugging Face's form by the harness' own `hf` model.

Megatron is not imported, and its CPU platform not put in force: transformers runs as it is.
"""

import os
import tempfile
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from cherry_megatron.errors import CherryError
from cherry_megatron.harness.asking import Asked, keep, loaded_tasks, put

BATCH = 8  # texts at once


def evaluate_hf(folder: Path, asked: Asked) -> Path:
    """Put tasks to a model in Hugging Face's form by the harness' own `hf` model; keep the scores in its folder.

    Code that is shipped with the weights is run.

    Raises:
        CherryError: if it is no such model, or a task or its data are not there.
    """
    if not (folder / "config.json").is_file():
        raise CherryError(f"--hf {folder} holds no config.json; name a folder with a model in Hugging Face's form")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CherryError("--hf runs as one process; start it without torchrun or srun")
    with loaded_tasks(asked) as tasks:
        try:
            device = "cuda" if torch.cuda.is_available() else "cpu"  # else it takes the first without looking
            lm = HFLM(pretrained=str(folder), trust_remote_code=True, batch_size=BATCH, device=device)
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CherryError(f"--hf {folder} cannot be opened: {why}") from None
        with tempfile.TemporaryFile("w") as log:
            found, seconds = put(lm, tasks, asked, True, log)
        model = {"checkpoint": str(folder.absolute()), "seconds": seconds}
        return keep(folder, model, asked, found, print)
