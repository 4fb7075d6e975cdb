"""What the tasks of an experiment leave behind: records.jsonl, one line a task."""

import json
import statistics
from pathlib import Path
from typing import Any

from cherry_megatron.config import Config, load
from cherry_megatron.errors import CherryError
from cherry_megatron.files import write_atomically
from cherry_megatron.monitor.accounting import account, together
from cherry_megatron.runs import read_evaluations, read_probes, read_rho, read_steps
from cherry_megatron.sgt.pairs import base_hash
from cherry_megatron.storage.lineage import read_lineage
from cherry_megatron.storage.tracker import newest, saved_folder, step_saved

RECORDS = "records.jsonl"
_ALWAYS = ("stage", "seed", "verb", "finished", "definition", "device", "seconds")
_TRAINING = ("parameters", "flops_per_token", "tokens_per_step", "steps", "loops", "evaluations")
Record = dict[str, Any]


def read_records(path: Path) -> dict[str, Record]:
    """Task -> its record, in the file's order.

    Raises:
        CherryError: if the file cannot be read.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for number, line in enumerate(lines, start=1):
            missing = [key for key in _ALWAYS if key not in line]
            missing += [
                key
                for key in _TRAINING
                if line.get("finished") and line.get("verb") == "pretrain" and key not in line
            ]
            if missing:
                raise CherryError(f"{path}: line {number} has no {missing[0]}; restore the records")
        return {f"{line['stage']}/seed-{line['seed']}": line for line in lines}
    except OSError as error:
        raise CherryError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise CherryError(f"{path} holds something else than an experiment's records") from None


class Records:
    """The records of an experiment's folder, on the disk after every change.

    A task that has begun has a line too, with `finished` false, its definition and the seconds spent so far.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / RECORDS
        self.by_task = read_records(self._path) if self._path.exists() else {}

    def put(self, task: str, record: Record) -> None:
        """Replace the record of a task."""
        self.by_task[task] = record
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.by_task.values())
        write_atomically(self._path, text)

    def finished(self, task: str, definition: str) -> bool:
        """Whether a task has been done as it is defined now."""
        record = self.by_task.get(task, {})
        return bool(record.get("finished")) and record["definition"] == definition


def results(verb: str, folder: Path) -> Record:
    """What a task whose command has ended well adds to its record.

    Raises:
        CherryError: if it has not done all that it should.
    """
    if verb == "pretrain":
        return _training(folder)
    if verb == "evaluate":
        if not (found := read_evaluations(folder)):
            raise CherryError("its folder does not hold what it should: no evaluation is recorded")
        return {"evaluations": found}
    if verb in ("compress-depth", "assemble-moee"):
        return _surgery(folder)
    return {}


def _training(run: Path) -> Record:
    config = load(run / "config.yaml")
    done, wanted = step_saved(run), wanted_steps(config)
    if done < wanted:
        raise CherryError(f"the training ended at step {done} of {wanted}; start again to go on")
    return measured(run, config, done)


def wanted_steps(config: Config) -> int:
    """The number of steps that a training is to have."""
    batch = config.value("global-batch-size") or config.positive("micro-batch-size")
    return int(config.value("train-iters") or config.value("train-samples") // batch)


def measured(run: Path, config: Config, done: int) -> Record:
    """What a training has measured, and what it takes to compare it.

    Args:
        run: its folder, with steps.jsonl.
        config: of the run.
        done: steps that count.
    """
    settings, sequence = config.as_dict(), config.positive("seq-length")
    batch = config.value("global-batch-size") or config.positive("micro-batch-size")
    model = together(account(config.recurrence, config.shape, sequence, config.moee, config.mtp.depths))
    return {
        "parameters": model.stored,
        "active_parameters": model.active,
        "flops_per_token": model.flops,
        "tokens_per_step": batch * sequence,
        "steps": done,
        "loops": config.recurrence.loops,
        "median_step_seconds": statistics.median(step["seconds"] for step in read_steps(run)),
        "evaluations": read_evaluations(run),
        "base": base_hash(settings, run.absolute().parents[1]),
        **({"sgt": settings["sgt"], "rho": read_rho(run), "probes": read_probes(run)} if config.sgt else {}),
    }


def _surgery(folder: Path) -> Record:
    saved = saved_folder(folder)
    lineage = None if saved is None else read_lineage(newest(saved))
    # The first two of a compression, the others of a mixture; its `seed` is the router's, not the task's.
    wanted = ("plan", "options", "moee", "experts")
    return {key: lineage[key] for key in wanted if key in lineage} if lineage else {}
