"""What follows an attempt, and what the run's folder says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.jobs.attempts import (
    FINISHED,
    LEFT,
    MOST_IN_VAIN,
    REQUEUE,
    STOP,
    Ranks,
    Verdict,
    begin,
    end,
    evaluated,
    read_attempts,
)
from cherry_megatron.runs import record_saved_step

KILLED = "srun: error: n2: task 3: Exited with exit code 7\nsrun: error: n1: tasks 0-1: Terminated\n"


class Job:
    """A job whose attempts train to step 100."""

    def __init__(self, run: Path) -> None:
        self.run, self.count, self.step = run, 0, 0

    def start(self) -> None:
        begin(self.run, "pretrain", "7", self.count, f"nodes{self.count}", self.step)
        self.count += 1

    def reach(self, step: int) -> None:
        with (self.run / "steps.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": step - 1, "loss": 1.0}) + "\n")
            file.write(json.dumps({"iteration": step, "loss": 1.0}) + "\n{")

    def end(self, status: int, saved: int | None = None, early: bool = False, **ranks: Any) -> Verdict:
        if saved is not None:
            self.step = saved
            record_saved_step(self.run, saved)
        attempt = read_attempts(self.run, "7")[-1]
        return end(self.run, attempt, Ranks(status, **ranks), self.step, last=100, early=early)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "run")


def test_finished(job: Job) -> None:
    job.start()
    verdict = job.end(0, saved=100)
    assert (verdict.decision, verdict.reason) == (FINISHED, "finished at step 100 of 100")
    (attempt,) = read_attempts(job.run)
    assert (attempt.status, attempt.step, attempt.saved, attempt.nodes) == (0, 0, 100, "nodes0")


def test_told_to_stop_is_requeued(job: Job) -> None:
    for saved in (10, 20, 30, 40, 50, 60, 70):
        job.start()
        verdict = job.end(0, saved=saved)
        assert (verdict.decision, verdict.without) == (REQUEUE, ())
        assert verdict.reason == f"was told to stop, saved at step {saved} of 100"


def test_what_slurm_ends_is_left_to_it(job: Job) -> None:
    job.start()
    assert job.end(0, saved=10, running=False).decision == LEFT
    job.start()
    assert job.end(143, running=False).decision == LEFT
    job.start()
    assert job.end(143, running=False).decision == LEFT, "preempted twice at a step is no failure"


def test_bad_input_is_not_tried_again(tmp_path: Path) -> None:
    for number, ranks in enumerate(({"status": 2}, {"status": 143, "errors": KILLED.replace("code 7", "code 2")})):
        job = Job(tmp_path / str(number))
        job.start()
        assert job.end(**ranks).decision == STOP


@pytest.mark.parametrize(("errors", "rank"), [("", 0), (KILLED.replace("code 7", "code 2"), 3)])
def test_the_rank_s_sentence_is_the_reason(job: Job, errors: str, rank: int) -> None:
    job.start()
    (job.run / "logs").mkdir()
    log = job.run / f"logs/slurm-7-{rank}.out"
    log.write_text("cherry pretrain: warmer\n\ncherry pretrain: f.yaml: unknown key 'a'; take it out\nleft\n")
    verdict = job.end(2, errors=errors)
    assert (verdict.decision, verdict.reason) == (STOP, "refused, f.yaml: unknown key 'a'; take it out")


def test_refused_later_is_tried_once_more(job: Job) -> None:
    """A rank of a node that SLURM has given up may still be there and hold the run's lock."""
    job.start()
    job.end(0, saved=5)
    job.start()
    verdict = job.end(143, errors=KILLED.replace("code 7", "code 2"))
    assert (verdict.decision, verdict.without) == (REQUEUE, ())
    job.start()
    assert job.end(2).decision == STOP


def test_a_lock_that_is_held_right_after_a_save_is_waited_for_too(job: Job) -> None:
    """The lost attempt ended after the step that it had saved, where the next one is refused."""
    job.start()
    job.reach(5)
    job.step = 5
    job.start()
    assert read_attempts(job.run)[0].place == (5, True)
    assert job.end(2).decision == REQUEUE
    job.start()
    assert job.end(2).decision == STOP


def test_early_end_that_was_asked_for(job: Job) -> None:
    job.start()
    assert job.end(0, saved=10, early=True).decision == STOP


def test_same_step_fails_twice(job: Job) -> None:
    job.start()
    assert job.end(0, saved=30).decision == REQUEUE
    job.start()
    job.reach(36)
    verdict = job.end(143, errors=KILLED)
    assert (verdict.decision, verdict.without) == (REQUEUE, ("n2",))
    assert verdict.reason == "n2: task 3: Exited with exit code 7; tried once more from step 30 of 100"
    job.start()
    job.reach(36)
    verdict = job.end(143, errors=KILLED)
    assert verdict.decision == STOP
    assert verdict.reason == (
        "two attempts failed after step 36 (n2: task 3: Exited with exit code 7); see the ranks' logs"
    )


def test_what_asks_to_be_started_again_is_no_fault_of_a_node(job: Job) -> None:
    """A rewind or a hang; at one step twice it is over."""
    job.start()
    job.reach(36)
    verdict = job.end(143, saved=30, errors=KILLED.replace("code 7", "code 75"))
    assert (verdict.decision, verdict.without) == (REQUEUE, ())
    assert verdict.reason == "ended to go on from step 30 of 100, see alarms.jsonl"
    job.start()
    job.reach(41)
    assert job.end(75).decision == REQUEUE
    job.start()
    job.reach(41)
    assert job.end(75).decision == STOP


def test_another_step_is_progress(job: Job) -> None:
    for reached, saved in ((36, 30), (41, None), (44, 40), (43, None)):
        job.start()
        job.reach(reached)
        assert job.end(1, saved=saved).decision == REQUEUE
    job.start()
    job.reach(43)
    assert job.end(1).decision == STOP


@pytest.mark.parametrize("saved", [(30, None), (None, 30)])
def test_the_same_step_is_none_whatever_was_saved_before_it(job: Job, saved: tuple[int | None, ...]) -> None:
    """The first failure may come after many checkpoints; and being told to stop between is no cure."""
    job.start()
    job.reach(36)
    assert job.end(1, saved=saved[0]).decision == REQUEUE
    job.start()
    assert job.end(0).decision == REQUEUE
    job.start()
    job.reach(36)
    assert job.end(1, saved=saved[1]).decision == STOP


def test_checkpoints_that_are_gone_are_no_start_from_the_beginning(job: Job) -> None:
    job.start()
    job.end(0, saved=30)
    job.step = 0
    with pytest.raises(
        CherryError, match=r"has saved a checkpoint of step 30, and now there is none; restore .*checkpoints"
    ):
        job.start()
    with pytest.raises(CherryError, match="of step 30"):
        begin(job.run, "pretrain", "8", 0, "n1", 0)
    begin(job.run, "assemble-moee", "9", 0, "n1", 0)


def test_never_a_newer_checkpoint(job: Job) -> None:
    for number in range(MOST_IN_VAIN - 1):
        job.start()
        job.reach(20 + number)
        assert job.end(143, running=False).decision == LEFT
    job.start()
    job.reach(50)
    verdict = job.end(1)
    assert verdict.decision == STOP
    assert "5 attempts in a row left no checkpoint newer than step 0" in verdict.reason


@pytest.mark.parametrize("signal", ["Terminated", "User defined signal 1"])
def test_told_to_stop_before_the_first_step_is_no_failure(job: Job, signal: str) -> None:
    """But no progress either, which is to have an end."""
    errors = f"srun: error: n1: task 0: {signal}\n"
    job.start()
    job.end(0, saved=30)
    for _ in range(MOST_IN_VAIN - 1):
        job.start()
        verdict = job.end(143, errors=errors)
        assert verdict == Verdict(REQUEUE, "was told to stop before its first step, goes on from step 30 of 100")
    job.start()
    verdict = job.end(143, errors=errors)
    assert verdict.decision == STOP
    assert "5 attempts in a row left no checkpoint newer than step 30; give them more time (CLUSTER_TIME)" in (
        verdict.reason
    )


def test_what_fails_before_the_first_step_is_one_whatever_was_told_between(job: Job) -> None:
    for status, errors, decision in (
        (1, "", REQUEUE), (143, "srun: error: n1: task 0: Terminated\n", REQUEUE), (1, "", STOP),
    ):  # fmt: skip
        job.start()
        assert job.end(status, errors=errors).decision == decision


def test_lost_attempts(job: Job) -> None:
    """Their second line is written by the next one; two at one step are enough."""
    job.start()
    job.reach(36)
    job.step = 30
    job.start()
    lost = read_attempts(job.run)[0]
    assert (lost.status, lost.saved, lost.reached, lost.reason) == (
        None, 30, 36, "lost, with its node or killed: nodes0",
    )  # fmt: skip
    job.reach(37)
    job.start()
    job.reach(37)
    with pytest.raises(CherryError, match=r"is not started again: two attempts failed after step 37 \(lost\)"):
        job.start()


def test_a_new_job_begins_anew(job: Job) -> None:
    for _ in range(2):
        job.start()
        job.end(1)
    with pytest.raises(CherryError, match="two attempts failed"):
        job.start()
    begin(job.run, "pretrain", "8", 0, "n1", 0)
    assert [a.job for a in read_attempts(job.run)] == ["7", "7", "8"]
    begin(job.run, "pretrain", "8", 0, "n1", 0)
    assert len(read_attempts(job.run, "8")) == 1, "by hand again in one allocation"


def test_ended_from_outside_says_nothing_of_the_node(job: Job) -> None:
    for number, signal in enumerate(("Terminated", "User defined signal 1")):
        job.start()
        job.reach(number + 1)
        assert job.end(143, errors=f"srun: error: n1: tasks 0-3: {signal}\n").without == ()
    job.start()
    job.reach(3)
    assert job.end(1, errors="srun: error: Node failure on n3\n").without == ("n3",)


def test_evaluated(tmp_path: Path) -> None:
    begin(tmp_path, "evaluate", "1", 0, "n1", 100)
    assert not evaluated(tmp_path, 100)
    (attempt,) = read_attempts(tmp_path)
    end(tmp_path, attempt, Ranks(0), saved=100, last=None, early=False)
    assert evaluated(tmp_path, 100)
    assert not evaluated(tmp_path, 200)


def test_half_a_line_is_passed_over(job: Job) -> None:
    job.start()
    with (job.run / "attempts.jsonl").open("a") as file:
        file.write('{"event": "end", "job"')
    assert job.end(0, saved=100).decision == FINISHED
    assert read_attempts(job.run)[0].saved == 100


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CherryError, match="cannot write"):
        begin(tmp_path / "run", "pretrain", "7", 0, "n1", 0)
