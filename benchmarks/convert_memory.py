"""The 1.02 billion parameters of configs/base_1b.yaml to the form of Hugging Face and back: time, and memory.

    python benchmarks/convert_memory.py --folder DIR

Makes a checkpoint with random float32 weights in DIR, where 13 GB are needed, and says whether what comes back has
the same hashes. Memory and page cache are as in compress_speed.py; so is `cp -r` of the same bytes beside it.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from compress_speed import copy_command, keep_model, make_source, timed

from cherry_megatron.storage.lineage import LINEAGE, MANIFEST

CONFIG = Path(__file__).parent.parent / "configs/base_1b.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    source, model_only = folder / "source", folder / "model-only"
    for path in (source, model_only):
        shutil.rmtree(path, ignore_errors=True)
    parameters = make_source(source, layers=48, hidden=1280, with_optimizer=False)
    keep_model(source, model_only)
    size = sum(path.stat().st_size for path in model_only.rglob("*"))
    print(f"{parameters:,} parameters, {size / 1e9:.2f} GB")
    program = [sys.executable, "tools/convert_hf.py"]
    out = [*program, "--load", str(source), "--save", str(folder / "hf"), "--config", str(CONFIG), "--no-tokenizer"]
    back = [*program, "--load", str(folder / "hf"), "--save", str(folder / "back")]
    for name, command, target in (
        ("cp -r", copy_command(model_only, folder / "copy"), folder / "copy"),
        ("out", out, folder / "hf"),
        ("back", back, folder / "back"),
    ):
        if name == "out":
            shutil.rmtree(folder / "copy")
        seconds, memory = timed(command, target)
        print(f"{name:<8}{seconds:8.2f} s {size / seconds / 1e6:8.0f} MB/s   peak {memory / 1e9:6.3f} GB")
    # What was read of the source, by the record, and what was written in the end.
    record = json.loads((folder / "hf" / LINEAGE).read_text())
    made = json.loads((folder / "back/iter_0000000" / LINEAGE).read_text())
    assert (folder / "back/iter_0000000" / MANIFEST).is_file()
    print("the same values" if made["identity"] == record["parents"][0]["identity"] else "OTHER VALUES")


if __name__ == "__main__":
    main()
