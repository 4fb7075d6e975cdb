"""`cherry experiment report`: the table and the plots of an experiment, from its records alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.experiments.plan import Experiment, Stage, find, read
from cherry_megatron.experiments.records import Record, read_records
from cherry_megatron.files import make_folder, write_atomically
from cherry_megatron.monitor.document import Block, Section, Table, markdown_page
from cherry_megatron.sgt.pairs import Run
from cherry_megatron.sgt.report import Compared, compare, spread, tables

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Row:
    """A stage of training, over the seeds that are done.

    Attributes:
        name: of the stage.
        label: for people.
        records: of its seeds, in the file's order.
    """

    name: str
    label: str
    records: list[Record]

    @property
    def parameters(self) -> int:
        """Stored."""
        return self._same("parameters")

    @property
    def active_parameters(self) -> int:
        """Those that a token meets; records of before they were counted are of models without experts."""
        return int(self.records[0].get("active_parameters", self.parameters))

    @property
    def flops_per_token(self) -> float:
        """Of training."""
        return self._same("flops_per_token")

    @property
    def steps(self) -> int:
        """Of this stage."""
        return int(self._same("steps"))

    @property
    def loops(self) -> int:
        """All of the model."""
        return int(self._same("loops"))

    @property
    def tokens(self) -> int:
        """Trained on."""
        return int(self.steps * self._same("tokens_per_step"))

    @property
    def flops(self) -> float:
        """Of this stage's training, without that of what it starts from."""
        return self.flops_per_token * self.tokens

    def final(self, loops: str | None = None) -> list[float]:
        """The last loss of each seed at a number of loops, by default all; none if one has not evaluated it."""
        return _all([_loss(record, record["evaluations"][-1:], loops) for record in self.records])

    def at(self, iteration: int, loops: str | None = None) -> list[float]:
        """The loss of each seed after so many steps at a number of loops, by default all."""
        found = [[e for e in r["evaluations"] if e["iteration"] == iteration] for r in self.records]
        return _all([_loss(r, evaluations, loops) for r, evaluations in zip(self.records, found, strict=True)])

    def curve(self) -> list[tuple[int, list[float]]]:
        """(tokens, loss of each seed) over training, of the seeds that were evaluated most often."""
        most = max(len(record["evaluations"]) for record in self.records)
        often = Row(self.name, self.label, [r for r in self.records if len(r["evaluations"]) == most])
        iterations = [evaluation["iteration"] for evaluation in often.records[0]["evaluations"]]
        points = [(iteration * self._same("tokens_per_step"), often.at(iteration)) for iteration in iterations]
        return [(tokens, losses) for tokens, losses in points if losses]

    def by_loops(self) -> list[tuple[int, list[float]]]:
        """(loops, loss of each seed) of the last evaluation."""
        last = self.records[0]["evaluations"][-1:]
        points = [(int(loops), self.final(loops)) for evaluation in last for loops in evaluation["losses"]]
        return [(loops, losses) for loops, losses in sorted(points) if losses]

    def experts(self, iteration: int) -> list[list[float]]:
        """The losses of each expert of a mixture of models after so many steps, by seed; empty if it is none."""
        each = [_by_expert(record, iteration) for record in self.records]
        return [_all([found.get(expert) for found in each]) for expert in sorted({*each[0]}, key=int)]

    def _same(self, key: str) -> Any:
        return self.records[0][key]


def report(name: str, records: Path, out: Path, plotted: Sequence[str] | None = None) -> list[Path]:
    """Write table.md and the plots.

    Args:
        name: of the experiment, or its file.
        records: its records.jsonl.
        out: the folder to write to.
        plotted: the stages in the plots over tokens, loops, parameters, FLOPs and probes, by default all.

    Returns:
        The files that were written.

    Raises:
        CherryError: bad input, or no training is done.
    """
    experiment, found = read(find(name)), read_records(records)
    for stage in plotted or ():
        _check_plotted(experiment, stage)
    rows = rows_of(experiment, found)
    if not rows:
        raise CherryError(f"{records} has no finished training of a stage of {experiment.source}")
    from cherry_megatron.experiments.plots import draw

    make_folder(out)
    compared = compare(runs_of(rows))
    files = {"table.md": table(experiment, found, rows, compared), **draw(rows, compared.rows, plotted)}
    for file, text in files.items():
        write_atomically(out / file, text)
    return [out / file for file in files]


def _check_plotted(experiment: Experiment, name: str) -> None:
    stage = experiment.stage(name)
    if stage.verb != "pretrain":
        trainings = ", ".join(other.name for other in experiment.stages.values() if other.verb == "pretrain")
        raise CherryError(
            f"--plot {name}: in {experiment.source} it is a stage of {stage.verb}, which has no losses; name some "
            f"of {trainings}"
        )


def rows_of(experiment: Experiment, records: dict[str, Record]) -> list[Row]:
    """The stages of training with a finished seed, in the file's order."""
    stages = [stage for stage in experiment.stages.values() if stage.verb == "pretrain"]
    rows = [Row(stage.name, stage.label, _finished(stage, records)) for stage in stages]
    return trained_alike([row for row in rows if row.records], experiment.source)


def trained_alike(rows: list[Row], source: Path) -> list[Row]:
    """The same rows.

    Raises:
        CherryError: if the seeds of one differ in more than their seed, naming the file that they are of.
    """
    for row in rows:
        for key in ("parameters", "flops_per_token", "tokens_per_step", "steps", "loops"):
            if len({record[key] for record in row.records}) > 1:
                raise CherryError(
                    f"{source}: the seeds of stage {row.name} were not run alike ({key} differs); "
                    "run them again or take the older lines out of the records"
                )
    return rows


def runs_of(rows: list[Row]) -> list[Run]:
    """The trainings of which selective supervision can be reported; those of older records cannot."""
    return [_run(row, record) for row in rows for record in row.records if "base" in record]


def _run(row: Row, record: Record) -> Run:
    return Run(
        name=f"{row.name}/seed-{record['seed']}",
        label=row.label,
        row=row.name,
        seed=record["seed"],
        settings={"megatron.seed": record["seed"], "configuration": record["base"]},
        sgt=record.get("sgt"),
        rho=record.get("rho"),
        loops=record["loops"],
        evaluations=record["evaluations"],
        probes=record.get("probes", []),
    )


def table(experiment: Experiment, records: dict[str, Record], rows: list[Row], compared: Compared) -> str:
    """The report as Markdown."""
    found = [Section("", losses_table(rows))]
    if mixtures := mixtures_table(rows):
        found.append(Section("Mixtures and their experts", mixtures))
    problems = [f"Not compared: {problem}." for problem in compared.problems]
    rest = [*problems, *_missing(experiment, records), made_by([record for row in rows for record in row.records])]
    if compared.rows:
        found.append(Section("Selective runs", tables(compared.rows)))
    found[-1] = Section(found[-1].title, [*found[-1].blocks, *rest])
    return markdown_page(experiment.about, found)


def losses_table(rows: list[Row]) -> list[Block]:
    """Sizes, tokens and held-out losses of stages of training."""
    experts = any(row.active_parameters != row.parameters for row in rows)
    head = [
        "", "stored parameters", *(["active parameters"] if experts else []), "GFLOP a token", "tokens",
        "loss at step 0", "loss at step 0, 1 loop", "final loss", "final loss, 1 loop",
    ]  # fmt: skip
    about = (
        "Held-out loss in nats a token, mean ± standard deviation over seeds (their number). GFLOP a token: of "
        "training. Tokens: of this stage alone."
    )
    return [Table(head, [_cells(row, experts) for row in rows]), about]


def _cells(row: Row, experts: bool) -> list[str]:
    return [
        row.label,
        short(row.parameters),
        *([short(row.active_parameters)] if experts else []),
        f"{row.flops_per_token / 1e9:.4g}",
        short(row.tokens),
        *map(spread, (row.at(0), row.at(0, "1"), row.final(), row.final("1"))),
    ]


def mixtures_table(rows: list[Row]) -> list[Block]:
    """What mixtures of models reach beside each of their experts, on the same text."""
    steps = [(row, step) for row in rows for step in (0, row.steps) if row.experts(step)]
    if not steps:
        return []
    most = max(len(row.experts(step)) for row, step in steps)
    cells = []
    for row, step in steps:
        losses = [row.at(step), *row.experts(step)]
        cells.append([row.label, str(step), *map(spread, losses), *["-"] * (1 + most - len(losses))])
    head = ["", "step", "mixture", *(f"expert {number}" for number in range(most))]
    about = "Held-out loss. Where a sequence is seen by some of the experts, an expert's is over what it sees."
    return [Table(head, cells), about]


def _missing(experiment: Experiment, records: dict[str, Record]) -> list[str]:
    """What the file asks for and the records have not."""
    lines = []
    for stage in experiment.stages.values():
        done = {record["seed"] for record in _finished(stage, records)}
        missing = [str(seed) for seed in stage.seeds if seed not in done]
        if missing:
            lines.append(f"{stage.label}: {'seeds missing: ' + ', '.join(missing) if done else 'not run'}.")
    return lines


def made_by(records: list[Record]) -> str:
    """On what and with which code trainings were done."""
    commits = sorted({f"{r.get('commit')}{' (modified)' if r.get('modified') else ''}" for r in records})
    devices = sorted({record["device"] for record in records})
    hours = sum(record["seconds"] for record in records) / 3600
    return f"Trained on {', '.join(devices)} in {hours:.2f} hours together, commit {', '.join(commits)}."


def _finished(stage: Stage, records: dict[str, Record]) -> list[Record]:
    found = [records.get(f"{stage.name}/seed-{seed}") for seed in stage.seeds]
    return [record for record in found if record is not None and record["finished"]]


def _loss(record: Record, evaluations: list[dict[str, Any]], loops: str | None = None) -> float | None:
    wanted = str(record["loops"]) if loops is None else loops
    return evaluations[0]["losses"].get(wanted) if evaluations else None


def _by_expert(record: Record, iteration: int) -> dict[str, float]:
    """Expert -> its loss with all loops after so many steps."""
    found = [e for e in record["evaluations"] if e["iteration"] == iteration and "moee" in e]
    reported = found[0]["moee"].get(str(record["loops"]), {}) if found else {}
    start = "loss/"
    return {name.removeprefix(start): loss for name, loss in reported.items() if name.startswith(start)}


def _all(losses: list[float | None]) -> list[float]:
    """The losses of all seeds, or none: a mean over some of them would be another quantity."""
    found = [loss for loss in losses if loss is not None]
    return found if len(found) == len(losses) else []


def short(number: float) -> str:
    """Three digits and a unit."""
    size, unit = next(((size, unit) for size, unit in _UNITS if number >= size), (1, ""))
    return f"{number / size:.3g}{unit}"
