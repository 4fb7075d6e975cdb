"""Depth compression of a full-size checkpoint against `cp -r` of the same bytes: speed and memory.

    python benchmarks/compress_speed.py --folder DIR [--layers 48] [--hidden 1280] [--align none] [--repeats 2]

Makes a checkpoint with random weights (1.02 billion float32 parameters) and an optimizer state of the same
size that nothing may read, in DIR, which needs 14 GB for the defaults. Both programs are timed from start to
exit with everything flushed to the disk, and with the page cache dropped before (that needs root). Memory is the
largest sum of proportional set sizes over the process tree, without pages of files.
"""

import argparse
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from cherry_megatron.storage import records
from cherry_megatron.surgery import writing
from cherry_megatron.surgery.writing import Report, Spec

CONFIG = Path(__file__).parent.parent / "configs/cherry_227m.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--align", default="none")
    parser.add_argument("--no-optimizer", action="store_true", help="make the checkpoint without its state")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    source, model_only = options.folder / "source", options.folder / "model-only"
    for path in (source, model_only):
        shutil.rmtree(path, ignore_errors=True)
    parameters = make_source(source, options.layers, options.hidden, not options.no_optimizer)
    keep_model(source, model_only)
    copied = sum(path.stat().st_size for path in model_only.rglob("*"))
    print(f"source: {parameters:,} parameters, {copied / 1e9:.2f} GB of model")
    rows = []
    for _ in range(options.repeats):
        rows.append(("cp -r", *timed(copy_command(model_only, options.folder / "copy"), options.folder / "copy")))
        target = options.folder / "compressed"
        rows.append(("compress-depth", *timed(compress_command(source, target, options), target)))
    for name, seconds, memory in rows:
        print(f"{name:<16}{seconds:8.2f} s {copied / seconds / 1e6:8.0f} MB/s   peak {memory / 1e9:6.3f} GB")
    best = {name: min(seconds for found, seconds, _ in rows if found == name) for name, _, _ in rows}
    print(f"speed relative to cp -r: {best['cp -r'] / best['compress-depth']:.2f}")


def make_source(folder: Path, layers: int, hidden: int, with_optimizer: bool) -> int:
    """Write a checkpoint of 48 layers' form, one file a layer, without a manifest."""
    checkpoint = folder / "iter_0000001"
    checkpoint.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ffn, vocabulary = hidden * 5 // 2, 44544
    top = {
        "embedding.word_embeddings.weight": (vocabulary, hidden),
        "decoder.final_norm.weight": (hidden,),
        "output_layer.weight": (vocabulary, hidden),
    }
    parts: list[dict[str, tuple[int, ...]]] = [top]
    for layer in range(layers):
        attention, mlp = f"decoder.layers.{2 * layer}.self_attention", f"decoder.layers.{2 * layer + 1}.mlp"
        parts.append(
            {
                f"{attention}.linear_qkv.layer_norm_weight": (hidden,),
                f"{attention}.linear_qkv.weight": (3 * hidden, hidden),
                f"{attention}.linear_proj.weight": (hidden, hidden),
                f"{mlp}.linear_fc1.layer_norm_weight": (hidden,),
                f"{mlp}.linear_fc1.weight": (2 * ffn, hidden),
                f"{mlp}.linear_fc2.weight": (hidden, ffn),
            }
        )
    reports, count = [], 0
    for number, part in enumerate(parts):
        prefixes = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")[: 3 if with_optimizer else 1]
        for kind, prefix in enumerate(prefixes):
            path = checkpoint / f"__{number}_{kind}.distcp"
            written = []
            with path.open("w+b", buffering=0) as file:
                for name, shape in part.items():
                    values = rng.standard_normal(shape, dtype=np.float32)
                    at = file.seek(0, 2)
                    length = records.write_tensor(file, "float32", values)
                    written.append((Spec(prefix + name, "float32", shape), at, length, ""))
                    count += values.size if not prefix else 0
            reports.append(Report(path.name, "", tuple(written), {}))
    common = [{"args": records.new("argparse", "Namespace", {}), "checkpoint_version": 3.0, "iteration": 1}]
    with (checkpoint / "__objects.distcp").open("w+b", buffering=0) as file:
        place = ("__objects.distcp", 0, records.write_object(file, common))
    metadata = writing.metadata(reports, {"common_state/shard_0_1": place})
    (checkpoint / ".metadata").write_bytes(records.dump_pickle(metadata))
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    subprocess.run(["sync"], check=True)
    return count


def keep_model(source: Path, target: Path) -> None:
    """Hard links to the files that hold the model."""
    target.mkdir()
    for path in (source / "iter_0000001").glob("__*_0.distcp"):
        (target / path.name).hardlink_to(path)


def copy_command(source: Path, target: Path) -> list[str]:
    return ["sh", "-c", f"cp --reflink=never -r {source} {target} && find {target} -type f -exec sync {{}} +"]


def compress_command(source: Path, target: Path, options: argparse.Namespace) -> list[str]:
    overrides = ["--set", f"megatron.hidden-size={options.hidden}"]
    overrides += ["--set", f"megatron.ffn-hidden-size={options.hidden * 5 // 2}"]
    return [
        sys.executable, "tools/compress_depth.py", "--load", str(source), "--save", str(target),
        "--config", str(CONFIG), "--align", options.align, *overrides,
    ]  # fmt: skip


def timed(command: list[str], target: Path) -> tuple[float, int]:
    """Seconds and peak memory of a program that writes `target`."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak))
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - began
    watcher.join()
    if status:
        sys.exit(f"{command[0]} ended with {status}")
    return seconds, peak[0]


def watch(pid: int, peak: list[int]) -> None:
    """Keep the largest sum of anonymous proportional memory of a process and its children."""
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                except OSError:
                    continue
                found = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
                total += int(found["Pss_Anon"].split()[0]) * 1024
            peak[0] = max(peak[0], total)
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass


if __name__ == "__main__":
    main()
