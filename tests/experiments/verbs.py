"""Stands in for `cherry VERB` in the tests of the schedule: does nothing, in the form and the time that is asked.

assemble-moee                    writes down what it was to load
compress-depth --groups fail     ends with status 2
compress-depth --groups sleep    takes its time
evaluate, of 9 batches           leaves nothing
pretrain                         a step every 0.02 s, evaluated before the first if asked; SIGTERM saves and ends
"""

import json
import signal
import sys
import time
from pathlib import Path

import yaml


def main(verb: str, arguments: list[str]) -> int:
    flags = dict(
        text.removeprefix("--").split("=", 1) for text in arguments if text.startswith("--") and "=" in text
    )
    sets = [arguments[i + 1].split("=", 1) for i, text in enumerate(arguments) if text == "--set"]
    config = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
    for key, value in sets:
        section, _, name = key.rpartition(".")
        (config.setdefault(section, {}) if section else config)[name] = yaml.safe_load(value)
    if verb == "calibrate":
        Path(flags["output"]).mkdir(parents=True)
        return 0
    if verb == "assemble-moee":
        Path(flags["save"]).mkdir(parents=True)
        loads = arguments[arguments.index("--load") + 1 :]
        cut = next((i for i, text in enumerate(loads) if text.startswith("--")), len(loads))
        Path(flags["save"], "loads.json").write_text(json.dumps(loads[:cut]))
        return 0
    if verb == "compress-depth":
        return compress(Path(flags["save"]), flags.get("groups", ""))
    run = Path(config["run"])
    run.mkdir(parents=True, exist_ok=True)
    if verb == "pretrain":
        return pretrain(run, config)
    return 0 if config["evaluation"]["batches"] == 9 else evaluated(run, 0)


def compress(save: Path, groups: str) -> int:
    print("working")
    if groups == "fail":
        print("cherry compress-depth: this cannot be averaged", file=sys.stderr)
        return 2
    if groups == "sleep":
        time.sleep(60)
    save.mkdir(parents=True)
    return 0


def pretrain(run: Path, config: dict) -> int:
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    tracker = run / "checkpoints/latest_checkpointed_iteration.txt"
    step = int(tracker.read_text()) if tracker.exists() else 0
    if config["evaluation"]["at_start"] and step == 0:
        evaluated(run, 0)
    while step < config["megatron"]["train-iters"] and not asked:
        step += 1
        time.sleep(0.02)
        with (run / "steps.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": step, "seconds": 0.02}) + "\n")
    folder = run / f"checkpoints/iter_{step:07d}"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    tracker.write_text(str(step))
    return 0 if asked else evaluated(run, step)


def evaluated(run: Path, iteration: int) -> int:
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": iteration, "losses": {"1": 5.0, "3": 4.0 - iteration / 1000}}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
