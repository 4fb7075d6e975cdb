"""job check, job begin, job end, job chain: what the launchers of slurm/ leave to Python."""

import argparse
import os
import sys
from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.verbs.common import add_config, add_verb

NOTHING_TO_DO = REQUEUE = 10  # exit statuses of begin and end
UNFINISHED = 1
VERBS = ("pretrain", "compress-depth", "assemble-moee", "evaluate")


def add_job(verbs: argparse._SubParsersAction) -> None:
    text = "what a launcher asks in a job of a cluster, see docs/operations.md"
    actions = verbs.add_parser("job", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    _add_action(actions, "check", "read the configuration, as the job will", _check)
    parser = _add_action(actions, "begin", "record an attempt; print what its command is given besides", _begin)
    parser.add_argument("--records", type=Path, required=True, help="folder for copies of code and environment")
    parser = _add_action(actions, "end", "record an attempt's end; exit status 10 if it is to be requeued", _end)
    parser.add_argument("--status", type=int, required=True, help="of the ranks")
    parser.add_argument("--state", default="", help="of the job, as squeue names it")
    parser.add_argument("--errors", type=Path, required=True, help="what srun wrote to standard error")
    parser = add_verb(
        actions, "chain", "the stages from a dense parent to an evaluated mixture, a line each", _chain
    )
    for name, required in (("base", True), ("branches", True), ("mixture", True), ("selective", False)):
        parser.add_argument(f"--{name}", type=Path, required=required, metavar="CONFIG")


def _add_action(actions: argparse._SubParsersAction, name: str, text: str, run) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser = add_verb(actions, name, text, run)
    parser.add_argument("stage", choices=VERBS, help="the verb that is run")
    parser.add_argument("--load", nargs="*", default=[], metavar="RUN", help="what to start from")
    parser.add_argument("--parent", type=Path, metavar="CONFIG", help="else the run of this configuration")
    add_config(parser)
    return parser


def _stage(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from cherry_megatron.jobs.stages import stage_of

    given = arguments
    return stage_of(given.stage, given.config, given.set, given.flags, given.load, given.parent)


def _check(arguments: argparse.Namespace) -> None:
    _stage(arguments)


def _begin(arguments: argparse.Namespace) -> int:
    import yaml

    from cherry_megatron.jobs import attempts, snapshot

    stage = _stage(arguments)
    if stage.finished and stage.verb != "evaluate":
        print(f"{stage.output} is finished; nothing to do", file=sys.stderr)
        return NOTHING_TO_DO
    job, start = _job()
    attempts.begin(stage.run, stage.verb, job, start, os.environ.get("SLURM_JOB_NODELIST", ""), stage.saved)
    flags = {"flags": [*stage.settings.get("flags", []), *arguments.flags]}
    settings = yaml.safe_dump({**stage.settings, **flags}, sort_keys=False, allow_unicode=True)
    snapshot.keep(arguments.records, settings)
    print(f"{stage.verb} from {stage.start}", file=sys.stderr)
    for argument in stage.arguments:
        print(argument)
    return 0


def _end(arguments: argparse.Namespace) -> int:
    from cherry_megatron.jobs import attempts

    stage, (job, start) = _stage(arguments), _job()
    attempt = next((a for a in attempts.read_attempts(stage.run, job) if a.start == start), None)
    if attempt is None:
        raise CherryError(f"{stage.run / attempts.ATTEMPTS} has no attempt {start} of job {job}")
    errors = arguments.errors.read_text(errors="replace") if arguments.errors.exists() else ""
    ranks = attempts.Ranks(arguments.status, errors, arguments.state == "RUNNING")
    verdict = attempts.end(stage.run, attempt, ranks, stage.saved, stage.last, stage.ends_early)
    print(f"{stage.verb}: {verdict.decision}, {verdict.reason}", file=sys.stderr)
    if verdict.decision == attempts.REQUEUE:
        print(",".join(verdict.without))
        return REQUEUE
    return 0 if verdict.decision == attempts.FINISHED else attempt.status or UNFINISHED


def _chain(arguments: argparse.Namespace) -> None:
    from cherry_megatron.jobs.chain import chain

    for link in chain(arguments.base, arguments.branches, arguments.mixture, arguments.selective):
        fields = (link.name, link.script, link.config, link.parent, link.branches, link.state, link.output)
        print("\t".join(str(field or "-") for field in fields))


def _job() -> tuple[str, int]:
    """SLURM's id of this job, and how often it was requeued."""
    if "SLURM_JOB_ID" not in os.environ:
        raise CherryError("there is no SLURM_JOB_ID: this is asked in a job of SLURM, by a launcher of slurm/")
    return os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
