"""The chain of stages from a dense parent to an evaluated mixture, and what of it is left to do."""

from dataclasses import dataclass, replace
from pathlib import Path

from cherry_megatron.config import outline
from cherry_megatron.errors import CherryError
from cherry_megatron.jobs.stages import Stage, branch, experts, stage_of

FINISHED, NOT_NEEDED, LEFT = "finished", "not needed", "left"


@dataclass(frozen=True)
class Link:
    """A stage of the chain.

    Attributes:
        name: what it is called in the chain.
        script: its launcher.
        config: its configuration.
        parent: the configuration whose run, or runs, it starts from; None where its own says so.
        branches: those that are left, of a stage that has branches, as the tasks of an array: 0-3 or 0,2.
        state: finished, not needed (because what is made of it is finished), or left.
        output: what it makes.
    """

    name: str
    script: str
    config: Path
    parent: Path | None
    branches: str
    state: str
    output: str


def chain(base: Path, branches: Path, mixture: Path, selective: Path | None = None) -> list[Link]:
    """The chain in order.

    Args:
        base: configuration of the dense parent.
        branches: of the compressed model's branches, one an expert of the mixture.
        mixture: of the mixture.
        selective: of its last training on selected tokens, if there is to be one.

    Raises:
        CherryError: what a configuration lacks.
    """
    count = experts(outline(mixture))
    if not count:
        raise CherryError(f"{mixture}: a chain ends in a mixture; set moee.experts, or an E in recurrence.pattern")
    with branch(0):
        compress = stage_of("compress-depth", branches, parent=base)
    recover = []
    for number in range(count):
        with branch(number):
            recover.append(stage_of("pretrain", branches))
    assemble = stage_of("assemble-moee", mixture, parent=branches)
    last = selective or mixture
    links = [
        _link("base", "pretrain_base_1b.sh", base, stage_of("pretrain", base)),
        _link("compress", "compress_depth.sh", branches, compress, base),
        _of_branches(branches, recover),
        _link("assemble", "assemble_moee.sh", mixture, assemble, branches),
        _link("mixture", "pretrain_cherry_1p8b.sh", mixture, stage_of("pretrain", mixture)),
    ]
    if selective is not None:
        tuned = stage_of("pretrain", selective, parent=mixture)
        links.append(_link("sgt", "sgt_finetune.sh", selective, tuned, mixture))
    evaluation = _link("evaluate", "evaluate.sh", last, stage_of("evaluate", last))
    # What was evaluated on the way is not what the training ends with, and makes no stage needless.
    links.append(evaluation if links[-1].state == FINISHED else replace(evaluation, state=LEFT))
    return _needed(links)


def _link(name: str, script: str, config: Path, stage: Stage, parent: Path | None = None) -> Link:
    state = FINISHED if stage.finished else LEFT
    return Link(name, script, config, parent, "", state, str(stage.output))


def _of_branches(config: Path, stages: list[Stage]) -> Link:
    left = [number for number, stage in enumerate(stages) if not stage.finished]
    branches = ",".join(map(str, left))
    if len(left) > 1 and left == list(range(left[0], left[-1] + 1)):
        branches = f"{left[0]}-{left[-1]}"
    output = f"{stages[0].output} .. {stages[-1].output}"
    return Link("recover", "recover_227m.sh", config, None, branches, LEFT if left else FINISHED, output)


def _needed(links: list[Link]) -> list[Link]:
    """What a finished stage was made of need not be made again."""
    found: list[Link] = []
    after = LEFT
    for link in reversed(links):
        if link.state == LEFT and after != LEFT:
            link = replace(link, state=NOT_NEEDED)
        found.append(link)
        after = link.state
    return found[::-1]
