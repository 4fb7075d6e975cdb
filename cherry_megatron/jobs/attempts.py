"""The attempts of a run's jobs, and whether another one is worth it.

attempts.jsonl of the run's folder has a line as an attempt starts and one as it ends. One that was lost with its
node, or killed with the launcher, has no second line; the next one adds it from the steps that were recorded.

A job that was told to stop has saved, or had not begun, and is requeued. One that failed is requeued once: what
fails twice at one step will fail again. Attempts that leave no newer checkpoint are not repeated for ever either.
A training whose checkpoints are gone is not begun anew.
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.files import add_line, cannot_write, read_lines
from cherry_megatron.platform.leaving import AGAIN
from cherry_megatron.runs import why_lost

ATTEMPTS = "attempts.jsonl"
REFUSED = 2  # the exit status of bad input
MOST_IN_VAIN = 5  # attempts in a row that leave no newer checkpoint
_FIRST = re.compile(r"^srun: error: (?:Node failure on )?([\w.-]+)(?:$|: (tasks? [^:]+: .+))", re.MULTILINE)
_TOLD = ("Terminated", "User defined signal 1")  # before the training takes these for a wish
_STARTS = ("verb", "job", "start", "nodes", "step", "offset")  # the keys of the two lines
_ENDS = ("verb", "job", "start", "status", "saved", "reached", "decision", "reason", "node", "cause")
FINISHED, REQUEUE, STOP, LEFT = "finished", "requeue", "stop", "left to SLURM"


@dataclass
class Attempt:
    """One start of a job.

    Attributes:
        verb: what it runs.
        job: SLURM's id.
        start: how often the job was requeued before.
        nodes: those it has.
        step: of the newest checkpoint when it started.
        offset: bytes of steps.jsonl then.
        status: the exit status of its ranks, of those that failed the first one's; None while it runs, and if it
            was lost.
        saved: the step of the newest checkpoint when it ended.
        reached: the last step that it recorded, or `step`.
        decision: what was to follow.
        reason: why.
        node: where a rank failed first.
        cause: what srun said of it.
    """

    verb: str
    job: str
    start: int
    nodes: str
    step: int
    offset: int = 0
    status: int | None = None
    saved: int | None = None
    reached: int | None = None
    decision: str = ""
    reason: str = ""
    node: str = ""
    cause: str = ""

    @property
    def in_vain(self) -> bool:
        """Whether it ended and left no newer checkpoint."""
        return self.saved is not None and self.saved <= self.step

    @property
    def place(self) -> tuple[int | None, bool]:
        """Where it ended: after a step, and whether that was one of its own."""
        return self.reached, self.reached != self.step

    @property
    def told_early(self) -> bool:
        """Whether it was told to stop before a step of its own, from which on a training saves and ends with 0."""
        return self.reached == self.step and self.cause.endswith(_TOLD)

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than as it was told to."""
        return self.decision != LEFT and self.status != 0 and not self.told_early


@dataclass(frozen=True)
class Ranks:
    """How the ranks of an attempt ended.

    Attributes:
        status: the highest exit status.
        errors: what srun said.
        running: whether SLURM counts the job as running; otherwise it is being cancelled or requeued already.
    """

    status: int
    errors: str = ""
    running: bool = True


@dataclass(frozen=True)
class Verdict:
    """What follows an attempt: a decision, the reason, and nodes that the next one should do without."""

    decision: str
    reason: str
    without: tuple[str, ...] = ()


def read_attempts(run: Path, job: str | None = None) -> list[Attempt]:
    """The recorded attempts of a run in order, or those of one job."""
    found: dict[tuple[str, int], Attempt] = {}
    path = run / ATTEMPTS
    for line in read_lines(path) if path.exists() else ():
        key = (line["job"], line["start"])
        if line["event"] == "start":
            found.pop(key, None)  # of an allocation in which the launcher is started by hand, again
            found[key] = Attempt(**{name: line[name] for name in _STARTS})
        elif key in found:
            for name in _ENDS:
                setattr(found[key], name, line[name])
    return [attempt for attempt in found.values() if job in (None, attempt.job)]


def evaluated(run: Path, step: int) -> bool:
    """Whether an evaluation of a run at a step has ended well."""
    return any(a.verb == "evaluate" and a.decision == FINISHED and a.step == step for a in read_attempts(run))


def begin(run: Path, verb: str, job: str, start: int, nodes: str, step: int) -> Attempt:
    """Record that an attempt starts.

    Args:
        step: of the newest checkpoint.

    Raises:
        CherryError: if those before it show that it would be in vain or that checkpoints are lost, or the run's
            folder cannot be written.
    """
    if verb == "pretrain" and not step and (why := why_lost(run)):
        raise CherryError(why)
    before = read_attempts(run, job)
    if before and before[-1].saved is None:  # lost: what it left is what there is now
        lost = before[-1]
        reason = f"lost, with its node or killed: {lost.nodes}"
        _end(run, lost, Verdict(REQUEUE, reason), step)
    if why := hopeless(before):
        raise CherryError(f"{run} is not started again: {why}")
    attempt = Attempt(verb, job, start, nodes, step, _size(run / "steps.jsonl"))
    _write(run, {"event": "start", **{name: getattr(attempt, name) for name in _STARTS}})
    return attempt


def end(run: Path, attempt: Attempt, ranks: Ranks, saved: int, last: int | None, early: bool) -> Verdict:
    """Record that an attempt has ended, and decide what follows.

    Args:
        run: its folder.
        attempt: from `read_attempts`.
        ranks: how they ended.
        saved: step of the newest checkpoint.
        last: the training's last step; None for another stage.
        early: whether the training may end before it by itself.
    """
    node, cause = first_to_fail(ranks.errors)
    code = re.search(r"exit code (\d+)$", cause)  # the others' is that of being ended
    attempt.status, attempt.cause = int(code[1]) if code else ranks.status, cause
    # Neither being ended from outside nor bad input nor a step that was no good says anything of the node.
    attempt.node = "" if cause.endswith(_TOLD) or attempt.status in (REFUSED, AGAIN) else node
    attempt.saved, attempt.reached = saved, _reached(run, attempt)
    earlier = [a for a in read_attempts(run, attempt.job) if a.start != attempt.start]
    verdict = _decide([*earlier, attempt], ranks.running, last, early, _refusal(run, attempt))
    _end(run, attempt, verdict, saved)
    return verdict


def _decide(attempts: Sequence[Attempt], running: bool, last: int | None, early: bool, refusal: str) -> Verdict:
    attempt = attempts[-1]
    saved = attempt.saved or 0
    at = f"step {saved}" + (f" of {last}" if last else "")
    if attempt.status == 0 and (last is None or saved >= last):
        return Verdict(FINISHED, "finished" if last is None else f"finished at {at}")
    if not running:
        return Verdict(LEFT, f"ended by SLURM, saved at {at}" if last else "ended by SLURM")
    # Later than at the first start it is not the input: a rank of a lost node may still hold the run's lock.
    if attempt.status == REFUSED and len(attempts) == 1:
        return Verdict(STOP, f"refused, {refusal or "see the ranks' logs"}")
    if attempt.status == 0 and early:
        return Verdict(STOP, f"ended at {at}, as --exit-interval or --exit-duration-in-mins asks")
    if why := hopeless(attempts):
        return Verdict(STOP, why)
    if attempt.status == 0:
        return Verdict(REQUEUE, f"was told to stop, saved at {at}")
    if attempt.told_early:
        return Verdict(REQUEUE, f"was told to stop before its first step, goes on from {at}")
    if attempt.status == AGAIN:
        return Verdict(REQUEUE, f"ended to go on from {at}, see alarms.jsonl")
    bad = tuple(dict.fromkeys(a.node for a in attempts if a.node))
    return Verdict(REQUEUE, f"{_failure(attempt)}; tried once more from {at}", bad)


def hopeless(attempts: Sequence[Attempt]) -> str | None:
    """Why another attempt would end as these did, or None if it might not."""
    failed = [attempt for attempt in attempts if attempt.failed]
    if len(failed) > 1 and failed[-1].place == failed[-2].place:
        return f"two attempts failed after step {failed[-1].reached} ({_failure(failed[-1])}); see the ranks' logs"
    vain = list(takewhile(lambda attempt: attempt.in_vain, reversed(attempts)))
    if len(vain) >= MOST_IN_VAIN:
        return (
            f"{len(vain)} attempts in a row left no checkpoint newer than step {vain[0].step}; give them more "
            "time (CLUSTER_TIME), or save more often"
        )
    return None


def first_to_fail(errors: str) -> tuple[str, str]:
    """The node of the task that failed first and what became of it, by srun's messages; empty if none says."""
    found = _FIRST.search(errors)
    return (found[1], found[2] or "node failure") if found else ("", "")


def _refusal(run: Path, attempt: Attempt) -> str:
    """The sentence with which `cherry` refused on the rank that failed first, or on rank 0; empty if it did not."""
    rank = re.search(r"\d+", attempt.cause.partition(":")[0])
    path = run / "logs" / f"slurm-{attempt.job}-{rank[0] if rank else 0}.out"
    text = path.read_text(errors="replace") if path.exists() else ""
    said = re.findall(rf"^cherry {attempt.verb}: (.+)", text, re.MULTILINE)
    return said[-1] if said else ""


def _failure(attempt: Attempt) -> str:
    if attempt.status is None:
        return "lost"
    where = f"{attempt.node}: " if attempt.node else ""
    return f"{where}{attempt.cause}" if attempt.cause else f"exit status {attempt.status}"


def _end(run: Path, attempt: Attempt, verdict: Verdict, saved: int) -> None:
    attempt.saved, attempt.decision, attempt.reason = saved, verdict.decision, verdict.reason
    attempt.reached = _reached(run, attempt)
    _write(run, {"event": "end", **{name: getattr(attempt, name) for name in _ENDS}})


def _reached(run: Path, attempt: Attempt) -> int:
    """The last step that an attempt recorded, or the one it started from."""
    path = run / "steps.jsonl"
    if attempt.verb != "pretrain" or _size(path) <= attempt.offset:
        return attempt.step
    with path.open("rb") as file:
        file.seek(attempt.offset)
        text = file.read().decode(errors="replace")
    return max((int(step) for step in re.findall(r'"iteration": (\d+),', text)), default=attempt.step)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write(run: Path, record: dict[str, Any]) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        add_line(run / ATTEMPTS, {"time": time, **record})
    except OSError as error:
        raise cannot_write(run / ATTEMPTS, error) from None
