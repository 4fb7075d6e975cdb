"""evaluate."""

import argparse
import os
import tempfile
from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.verbs.common import add_config, add_verb, load_config

# What each of the forms of this verb takes beside its own option.
_FORMS = {
    "compare": ("changed",),
    "hf": ("tasks", "task_dir", "limit", "fewshot"),
    "tasks": ("config", "set", "flags", "task_dir", "limit", "fewshot", "loops", "verbose"),
}
_ALL = ("config", "set", "flags", "tasks", "task_dir", "limit", "fewshot", "loops", "hf", "changed", "verbose")


def add_evaluate(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "evaluate", "held-out loss of a run's checkpoint, or its scores on tasks, by loops", _run
    )
    parser.add_argument(
        "--loops",
        type=int,
        nargs="+",
        help="numbers of loops (default 1, 2, 4, ... and the model's; with --tasks the model's)",
    )
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks of lm-evaluation-harness, e.g. kmmlu,haerae")
    parser.add_argument("--task-dir", type=Path, metavar="DIR", help="where their data lie, and further tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N items of each task alone")
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before each item (default the task's)")
    parser.add_argument("--hf", type=Path, metavar="DIR", help="ask a model in Hugging Face's form instead")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="two evaluations on tasks, item by item"
    )
    parser.add_argument("--changed", type=Path, metavar="FILE", help="with --compare: write the items that changed")
    parser.add_argument("--verbose", action="store_true", help="show Megatron's own output too")
    add_config(parser, required=False)


def _run(arguments: argparse.Namespace) -> None:
    form = next((form for form in _FORMS if getattr(arguments, form) is not None), None)
    if form is None:
        _refuse(arguments, ("config", "set", "flags", "loops", "verbose"), "belongs to --tasks or --compare")
        return _losses(arguments)
    _refuse(arguments, (form, *_FORMS[form]), f"does not go with --{form}")
    if form == "compare":
        return _compare(arguments)
    return _tasks(arguments)


def _refuse(arguments: argparse.Namespace, taken: tuple[str, ...], why: str) -> None:
    for name in _ALL:
        if name not in taken and getattr(arguments, name) not in (None, [], False):
            option = "a flag after --" if name == "flags" else f"--{name.replace('_', '-')}"
            raise CherryError(f"{option} {why}; take it out")


def _losses(arguments: argparse.Namespace) -> None:
    from cherry_megatron.platform.machine import prepare

    machine = prepare()
    config = load_config(arguments)
    from cherry_megatron.evaluate import evaluate

    evaluate(config, machine, arguments.loops, show_all=arguments.verbose)


def _tasks(arguments: argparse.Namespace) -> None:
    from cherry_megatron.harness import require_harness

    require_harness()
    if arguments.tasks is None:
        raise CherryError("--hf says which model; say what to ask it with --tasks")
    if arguments.task_dir is None:
        raise CherryError(
            "--tasks needs --task-dir, the folder with the data of the tasks; nothing is asked of the network"
        )
    with tempfile.TemporaryDirectory(prefix="cherry-hub-") as home:
        # Before anything imports what would look for a hub.
        os.environ.update(HF_HOME=home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        from cherry_megatron.harness.asking import Asked

        names = tuple(name.strip() for name in arguments.tasks.split(","))
        asked = Asked(names, arguments.task_dir, arguments.limit, arguments.fewshot)
        if arguments.hf is not None:
            from cherry_megatron.harness.hugging_face import evaluate_hf

            evaluate_hf(arguments.hf, asked)
            return
        from cherry_megatron.platform.machine import prepare

        machine = prepare()
        config = load_config(arguments)
        from cherry_megatron.harness.run import evaluate_run

        evaluate_run(config, machine, asked, arguments.loops, show_all=arguments.verbose)


def _compare(arguments: argparse.Namespace) -> None:
    from cherry_megatron.harness.compare import compare

    first, second = arguments.compare
    print("\n".join(compare(first, second, arguments.changed)))
