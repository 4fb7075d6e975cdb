"""Assembling CHERRY-1.8B from eight runs of 227M in float32: time, and memory of the process tree.

    python benchmarks/assemble_memory.py --folder DIR
    python benchmarks/assemble_memory.py --folder DIR --config configs/layers_227m.yaml    # experts inside layers

Makes one run with random weights in DIR and names it eight times; 8.3 GB are needed there. Memory and page cache
are as in compress_speed.py.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from compress_speed import make_source, timed

from cherry_megatron.storage.lineage import LINEAGE
from cherry_megatron.storage.tracker import newest

CONFIG = Path(__file__).parent.parent / "configs/cherry_1p8b.yaml"
RECORD = {"operation": "random", "identity": "random", "parents": []}  # experts inside layers need an ancestor
EXPERTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    arguments = parser.parse_args()
    folder = arguments.folder
    source, target = folder / "run", folder / "mixture"
    shutil.rmtree(source, ignore_errors=True)
    parameters = make_source(source, layers=6, hidden=1280, with_optimizer=False)
    (newest(source) / LINEAGE).write_text(json.dumps(RECORD))
    command = [
        sys.executable, "tools/assemble_moee.py", "--load", *[str(source)] * EXPERTS, "--save", str(target),
        "--config", str(arguments.config),
    ]  # fmt: skip
    seconds, memory = timed(command, target)
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{EXPERTS} x {parameters:,} parameters, {written / 1e9:.2f} GB")
    print(f"{seconds:.1f} s, peak {memory / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
