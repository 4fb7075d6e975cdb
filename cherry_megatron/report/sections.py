"""The sections of a report but for the claims: what each shows of a source."""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cherry_megatron.experiments.records import Record
from cherry_megatron.experiments.report import Row, losses_table, made_by, mixtures_table, short
from cherry_megatron.monitor.accounting import PEAK_BF16
from cherry_megatron.monitor.document import Block, Listing, Plot, Table
from cherry_megatron.report.sources import Folder, Source, keys_of, needs, task_of
from cherry_megatron.sgt.report import spread, tables
from cherry_megatron.storage.ancestry import how
from cherry_megatron.storage.lineage import chain

_MANY = 10  # trainings, beyond which curves are those of the ones with most seeds
_TEXTS = 5  # of an evaluation that are shown
_CAPTIONS = {
    "loss-tokens.svg": "Held-out loss over the tokens of the stage.",
    "losses.svg": "Final held-out loss of each training.",
    "loss-parameters.svg": "Final held-out loss over stored parameters, of which a recurrent model has few.",
    "loss-flops.svg": "Final held-out loss over the FLOPs of the stage, of which a recurrent model saves none.",
    "loss-loops.svg": "Final held-out loss with fewer loops than all.",
    "recovered.svg": "What selective runs recover of the gain of full supervision.",
    "coupling-cos.svg": "Gradient coupling of selected and other tokens: cos.",
    "coupling-ratio.svg": "Gradient coupling of selected and other tokens: ratio.",
}
Plotted = Sequence[str] | None


def about(sources: Sequence[Source]) -> list[Block]:
    """What the report was made from."""
    lines = []
    for source in sources:
        trained = [record for row in source.rows for record in row.records]
        made = re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", made_by(trained))
        seeds = f", {len(trained)} with all seeds" if len(trained) > len(source.rows) else ""
        lines.append(f"{source.name}: {len(source.rows)} training(s){seeds}. {made}")
    texts = {folder.text for source in sources for folder in source.folders.values()}
    if len(texts) > 1:
        lines.append(
            "These runs were evaluated on different text (data, split, length, batches, targets left out), so not "
            "all of their losses compare."
        )
    ways = "Curves and points are the mean over seeds, bands and bars go from the lowest to the highest seed."
    few = f" Of more than {_MANY} trainings curves are those of the ones with most seeds; --plot picks others."
    return [Listing(lines), ways + (few if any(len(source.rows) > _MANY for source in sources) else "")]


def stages(source: Source, _: Plotted) -> list[Block]:
    """How each stage was made."""
    found: dict[str, list[Record]] = {}
    named = {record["stage"]: row for row in source.rows for record in row.records}
    for record in source.records.values():
        row = named.get(record["stage"])
        found.setdefault(row.name if row else record["stage"], []).append(record)
    head = ["", "made by", "starts from", "learns from", "seeds", "steps", "tokens", "on", "hours"]
    return [Table(head, [_stage(source, named.get(name), records) for name, records in found.items()])]


def _stage(source: Source, row: Row | None, records: list[Record]) -> list[str]:
    first = records[0]
    start, teacher = _from(source, first)
    open_ones = [record for record in records if not record["finished"]]
    hours = sum(record["seconds"] for record in records) / 3600
    devices = {f"{record.get('devices', 1)} x {record['device']}" for record in records}
    return [
        row.label if row else _label(first),
        first["verb"] + (f" ({len(open_ones)} not finished)" if open_ones else ""),
        start or "-",
        teacher or "-",
        ", ".join(str(record["seed"]) for record in records),
        str(row.steps) if row else "-",
        short(row.tokens) if row else "-",
        ", ".join(sorted(devices)),
        f"{hours:.2f}" if hours >= 0.01 else f"{hours * 3600:.0f} s",
    ]


def _from(source: Source, record: Record) -> tuple[str, str]:
    """What a stage's weights and its teacher are, by the labels of their stages."""
    if (folder := source.folders.get(record["stage"])) is not None:
        parents = folder.lineage["parents"] if folder.lineage else []
        of_teacher = [_place(entry) for entry in parents if entry.get("role") == "teacher"]
        weights = [_place(entry) for entry in parents if entry.get("role") != "teacher"]
        return ", ".join(weights), ", ".join(of_teacher)
    teacher = keys_of(record).get("distillation.load")
    parents = [task for task in needs(record, source.records) if task != teacher]
    known = source.records.get(teacher or "")
    return ", ".join(_label(source.records[task]) for task in parents), _label(known) if known else teacher or ""


def _place(entry: dict[str, Any]) -> str:
    """The last folders of a checkpoint's path, without those that every run has."""
    path = Path(entry.get("path", ""))
    kept = [part for part in path.parts if part != "checkpoints" and not part.startswith("iter_")]
    return "/".join(kept[-2:]) or entry["operation"]


def lineage(source: Source, _: Plotted) -> list[Block]:
    """What each training's weights come from, generation by generation."""
    if source.folders:
        lines = []
        for folder in source.folders.values():
            if folder.lineage is not None:
                lines += [_generation(folder, depth, entry) for depth, entry in chain(folder.lineage)]
        head = ["", "made by", "step", "identity", "when", "code", "how"]
        return [Table(head, lines)] if lines else []
    chains = []
    for row in source.rows:
        steps = list(_ancestors(source, row.records[0]))
        if len(steps) > 1:
            chains.append(" ← ".join(steps))
    return [Listing(chains)] if chains else []


def _generation(folder: Folder, depth: int, entry: dict[str, Any]) -> list[str]:
    git = entry.get("git", {})
    name = f"`{folder.name}`" if depth == 0 else f"{'· ' * depth}{entry.get('role', '')} {_place(entry)}"
    return [
        re.sub(" +", " ", name),
        entry["operation"],
        str(entry.get("iteration", "-")),
        entry["identity"][:12] or "-",
        entry.get("time", "-")[:16].replace("T", " "),
        f"{str(git.get('commit'))[:10]}{'+' if git.get('modified') else ''}" if git else "-",
        how(entry).strip() or "-",
    ]


def _ancestors(source: Source, record: Record) -> list[str]:
    """A recorded stage and those before it, newest first, until one has several parents or is its own ancestor."""
    known, found = source.records, []
    seen: set[str] = set()
    left = [task_of(record)]
    while len(left) == 1 and left[0] not in seen:
        task = left[0]
        seen.add(task)
        teacher = keys_of(known[task]).get("distillation.load")
        left = [parent for parent in needs(known[task], known) if parent != teacher]
        taught = f" (taught by {_label(known[teacher])})" if teacher in known else ""
        found.append(_made(known[task]) + taught)
    return [*found, " + ".join(_label(known[task]) for task in left)] if len(left) > 1 else found


def _made(record: Record) -> str:
    """A stage's label, and of a surgery what it did."""
    if record["verb"] == "pretrain":
        return _label(record)
    options = [
        str(record.get("options", {})[key]) for key in ("method", "groups") if key in record.get("options", {})
    ]
    return f"{_label(record)} ({': '.join(filter(None, (record['verb'], ', '.join(options))))})"


def _label(record: Record) -> str:
    return str(record.get("label", record["stage"]))


def losses(source: Source, plotted: Plotted) -> list[Block]:
    """Held-out losses, over training too; of runs the training loss."""
    found: list[Block] = [*losses_table(source.rows), *_drawn(source, plotted, "loss-tokens.svg", "losses.svg")]
    if source.folders:
        from cherry_megatron.report.figures import over_steps

        caption = "Training loss, means of neighbouring steps; skipped steps are left out."
        found += over_steps("training-loss.svg", caption, "loss, nats a token", _some(source, plotted), _loss)
    return found


def _loss(step: dict[str, Any]) -> float | None:
    if "skipped" in step:
        return None
    loss: float | None = step.get("loss")
    return step.get("selected_loss") if loss is None else loss


def sizes(source: Source, plotted: Plotted) -> list[Block]:
    """Loss against what a model keeps and what it costs."""
    rows = shown(source, plotted)
    differ: dict[str, set[float]] = {
        "loss-parameters.svg": {row.parameters for row in rows},
        "loss-flops.svg": {row.flops for row in rows},
    }
    return _drawn(source, plotted, *(file for file, values in differ.items() if len(values) > 1))


def loops(source: Source, plotted: Plotted) -> list[Block]:
    """Final loss by number of loops."""
    rows = [row for row in source.rows if len(row.by_loops()) > 1]
    if not rows:
        return []
    numbers = sorted({number for row in rows for number, _ in row.by_loops()})
    cells = [[row.label, *(spread(dict(row.by_loops()).get(number, [])) for number in numbers)] for row in rows]
    head = ["", *(f"{number} loop{'s' if number > 1 else ''}" for number in numbers)]
    return [Table(head, cells), *_drawn(source, plotted, "loss-loops.svg")]


def selective(source: Source, plotted: Plotted) -> list[Block]:
    """What selective trainings recover, and the coupling of the gradients."""
    problems = [f"Not compared: {problem}." for problem in source.compared.problems]
    if not source.compared.rows:
        return [*problems]
    names = ("recovered.svg", "coupling-cos.svg", "coupling-ratio.svg")
    return [*tables(source.compared.rows), *problems, *_drawn(source, plotted, *names)]


def experts(source: Source, _: Plotted) -> list[Block]:
    """Mixtures beside their experts, and what each expert gets."""
    from cherry_megatron.report.figures import expert_map

    maps: list[Block] = []
    for number, folder in enumerate(source.folders.values()):
        maps += expert_map(f"experts-{number}.svg", folder)
    return [*mixtures_table(source.rows), *maps]


def multi_token(source: Source, _: Plotted) -> list[Block]:
    """Loss and acceptance of each depth at the last evaluation, with all loops."""
    found = []
    for row in source.rows:
        ends = [record["evaluations"][-1] for record in row.records if record["evaluations"]]
        said = [end.get("mtp", {}).get(str(row.loops), {}) for end in ends]
        found += [
            [row.label, tag, spread([each[tag] for each in said if tag in each])]
            for tag in dict.fromkeys(tag for each in said for tag in each)
        ]
    about = (
        "Held-out, at the last evaluation. loss/D: of depth D. acceptance/D: share that the model itself would say."
    )
    return [Table(["", "", "mean over seeds"], found), about] if found else []


def speed(source: Source, plotted: Plotted) -> list[Block]:
    """How fast each training was."""
    head = ["", "on", "seconds a step", "tokens/s", "TFLOP/s a device", "MFU", "peak GiB"]
    about = (
        "Median step. MFU: against 989 TFLOP/s, the dense BF16 peak of an H100 or H200, and given for these alone. "
        "Stages of an experiment may have shared a GPU."
    )
    found: list[Block] = [Table(head, [_speed(source, row) for row in source.rows]), about]
    if source.folders:
        from cherry_megatron.report.figures import over_steps

        caption = "Seconds a step, means of neighbouring steps."
        found += over_steps("seconds.svg", caption, "seconds", _some(source, plotted), lambda step: step["seconds"])
    return found


def _speed(source: Source, row: Row) -> list[str]:
    records = row.records
    seconds = statistics.median(record["median_step_seconds"] for record in records)
    devices, device = records[0].get("devices", 1), records[0]["device"]
    tokens = records[0]["tokens_per_step"] / seconds if seconds else 0.0
    flops = tokens * row.flops_per_token / devices
    known = [source.folders[record["stage"]] for record in records if record["stage"] in source.folders]
    peaks = [step["peak_gib"] for folder in known for step in folder.steps[-1:] if "peak_gib" in step]
    return [
        row.label,
        f"{devices} x {device}",
        f"{seconds:.4g}",
        f"{tokens:,.0f}",
        f"{flops / 1e12:.3g}",
        f"{flops / PEAK_BF16:.1%}" if re.search(r"\bH[12]00\b", device) else "-",
        f"{max(peaks):.1f}" if peaks else "-",
    ]


def health(source: Source, plotted: Plotted) -> list[Block]:
    """Alarms, skipped steps, starts, and the gradient norm of runs."""
    if not source.folders:
        return ["An experiment's records keep no alarms; `cherry status RUN` reads them of a run's folder."]
    from cherry_megatron.report.figures import over_steps

    head = ["", "steps", "skipped", "alarms", "starts", "attempts of jobs"]
    told = [
        f"{folder.name}, step {alarm['iteration']}: {alarm['text']}"
        for folder in source.folders.values()
        for alarm in folder.alarms[-5:]
    ]
    found: list[Block] = [Table(head, [*map(_health, source.folders.values())])]
    found += ["The last alarms of each run:", Listing(told)] if told else []
    caption = "Gradient norm before clipping, means of neighbouring steps."
    return found + over_steps(
        "gradient-norm.svg", caption, "gradient norm", _some(source, plotted), lambda step: step["grad_norm"]
    )


def _health(folder: Folder) -> list[str]:
    kinds = Counter(alarm["kind"] for alarm in folder.alarms)
    ends = Counter(line.get("decision") for line in folder.attempts if line.get("event") == "end")
    return [
        folder.name,
        str(folder.steps[-1]["iteration"]),
        str(sum("skipped" in step for step in folder.steps)),
        _counted(kinds) or "none",
        str(len(folder.starts)),
        _counted(ends) or "-",
    ]


def _counted(found: "Counter[Any]") -> str:
    return ", ".join(f"{number} {kind}" for kind, number in found.items())


def generations(source: Source, _: Plotted) -> list[Block]:
    """What runs wrote at their last evaluation, and how varied it is."""
    last = {folder.name: folder.generations[-1] for folder in source.folders.values() if folder.generations}
    if not last:
        return []
    names = list(dict.fromkeys(name for line in last.values() for name in line["health"]))
    measures = [
        [run, *(f"{line['health'][name]:.3g}" if name in line["health"] else "-" for name in names)]
        for run, line in last.items()
    ]
    texts = [
        [run, text["prompt"], text["continuation"]] for run, line in last.items() for text in line["texts"][:_TEXTS]
    ]
    return [Table(["", *names], measures), Table(["", "prompt", "continuation"], texts)]


def _drawn(source: Source, plotted: Plotted, *files: str) -> list[Block]:
    """Plots of an experiment that are not empty."""
    from cherry_megatron.experiments.plots import draw

    made = draw(source.rows, source.compared.rows, [row.name for row in shown(source, plotted)], files)
    return [Plot(file, made[file], _CAPTIONS[file]) for file in files if file in made]


def shown(source: Source, plotted: Plotted) -> list[Row]:
    """The trainings of the plots of curves."""
    if plotted:
        return [row for row in source.rows if row.name in plotted or row.label in plotted]
    if len(source.rows) <= _MANY:
        return source.rows
    most = max(len(row.records) for row in source.rows)
    return [row for row in source.rows if len(row.records) == most]


def _some(source: Source, plotted: Plotted) -> list[Folder]:
    names = [record["stage"] for row in shown(source, plotted) for record in row.records]
    return [source.folders[name] for name in names]
