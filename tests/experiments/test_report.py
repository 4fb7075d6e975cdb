"""The report's numbers against those counted by hand, and its pictures."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from cherry_megatron.errors import CherryError
from cherry_megatron.experiments import plots
from cherry_megatron.experiments.plan import read
from cherry_megatron.experiments.records import read_records
from cherry_megatron.experiments.report import report, rows_of, runs_of

STAGES = {
    "averaged": {"verb": "compress-depth", "args": {"load": "x"}},
    "recovered": {"label": "plain | average", "verb": "pretrain", "set": {"megatron.load": "{averaged}"}},
    "new": {"verb": "pretrain"},
    "late": {"verb": "pretrain"},
}
LOSSES = {1: (8.0, 4.0), 2: (9.0, 4.5), 3: (10.0, 5.0)}  # seed: at step 0, after 20 steps


def trained(stage: str, seed: int, evaluations: list[dict], finished: bool = True, loops: int = 2) -> dict:
    return {
        "stage": stage, "label": stage, "seed": seed, "verb": "pretrain", "finished": finished,
        "definition": "0" * 12,
        "command": "cherry pretrain", "commit": "abc", "modified": False, "device": "H100", "seconds": 1800.0,
        "parameters": 1_500_000, "flops_per_token": 9e6, "tokens_per_step": 1000, "steps": 20, "loops": loops,
        "median_step_seconds": 0.5, "evaluations": evaluations,
    }  # fmt: skip


def evaluated(iteration: int, loss: float) -> dict:
    return {"iteration": iteration, "losses": {"1": loss + 1, "2": loss}}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """An experiment and its records."""
    experiment = {"about": "Does it recover?", "config": "base.yaml", "seeds": [1, 2, 3], "stages": STAGES}
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    lines = [
        trained("new", 2, [{"iteration": 20, "losses": {"2": 6.0}}]),
        trained("new", 3, [], finished=False),
        *(trained("recovered", s, [evaluated(0, a), evaluated(20, b)]) for s, (a, b) in LOSSES.items()),
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "it.yaml", tmp_path / "records.jsonl"


def test_the_table_has_the_numbers_counted_by_hand(files, tmp_path):
    report(str(files[0]), files[1], tmp_path / "report")
    lines = (tmp_path / "report/table.md").read_text().splitlines()
    assert lines[0] == "# Does it recover?"
    assert lines[4:6] == [
        # 4.0, 4.5, 5.0: mean 4.5, deviation sqrt((0.25 + 0 + 0.25) / 2) = 0.5
        "| plain \\| average | 1.5M | 0.009 | 20k "
        "| 9.0000 ± 1.0000 (3) | 10.0000 ± 1.0000 (3) | 4.5000 ± 0.5000 (3) | 5.5000 ± 0.5000 (3) |",
        "| new | 1.5M | 0.009 | 20k | - | - | 6.0000 (1) | - |",
    ]
    text = "\n".join(lines)
    assert lines[2].startswith("| | stored parameters | GFLOP a token |") and "Mixtures" not in text
    assert "averaged: not run." in text and "late: not run." in text and "new: seeds missing: 1, 3." in text
    assert "Trained on H100 in 2.00 hours together, commit abc." in text


def test_a_mixture_stands_beside_its_experts(files, tmp_path):
    def mixed(iteration: int, loss: float, experts: list[float]) -> dict:
        shown = {f"loss/{number}": of_it for number, of_it in enumerate(experts)}
        return {**evaluated(iteration, loss), "moee": {"2": {**shown, "load/0": 0.5}, "1": {"loss/0": 99.0}}}

    path, records = files
    experiment = yaml.safe_load(path.read_text())
    experiment["stages"] |= {"two": {"verb": "pretrain", "label": "two | models"}, "ten": {"verb": "pretrain"}}
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    lines = [
        trained("two", 1, [mixed(0, 5.0, [6.0, 5.5]), mixed(10, 1.0, [1.0, 1.0]), mixed(20, 4.0, [4.5, 4.25])]),
        trained("two", 2, [mixed(0, 6.0, [6.0, 6.5]), mixed(20, 5.0, [5.5, 5.25])]),
        trained("ten", 1, [evaluated(0, 7.0), mixed(20, 3.0, [float(number) for number in range(11)])]),
    ]
    with records.open("a") as file:
        file.write("".join(json.dumps({**line, "active_parameters": 1_100_000}) + "\n" for line in lines))
    report(str(path), records, tmp_path / "report")
    text = (tmp_path / "report/table.md").read_text()
    assert text.splitlines()[2].startswith("| | stored parameters | active parameters | GFLOP a token |")
    assert "| two \\| models | 1.5M | 1.1M | 0.009 |" in text
    assert "| plain \\| average | 1.5M | 1.5M | 0.009 |" in text, "a record of before has no experts"
    found = text[text.index("## Mixtures and their experts") :].splitlines()
    assert found[2] == f"| | step | mixture | {' | '.join(f'expert {number}' for number in range(11))} |"
    none = " | -" * 9
    assert found[4:7] == [
        # 0.7071 = 1 / sqrt(2), half of it for a difference of a half.
        f"| two \\| models | 0 | 5.5000 ± 0.7071 (2) | 6.0000 ± 0.0000 (2) | 6.0000 ± 0.7071 (2){none} |",
        f"| two \\| models | 20 | 4.5000 ± 0.7071 (2) | 5.0000 ± 0.7071 (2) | 4.7500 ± 0.7071 (2){none} |",
        f"| ten | 20 | 3.0000 (1) | {' | '.join(f'{number}.0000 (1)' for number in range(11))} |",
    ]


def test_curves_are_those_of_the_seeds_evaluated_most_often(files):
    recovered, new = rows_of(read(files[0]), read_records(files[1]))
    assert recovered.curve() == [(0, [8.0, 9.0, 10.0]), (20_000, [4.0, 4.5, 5.0])]
    assert recovered.by_loops() == [(1, [5.0, 5.5, 6.0]), (2, [4.0, 4.5, 5.0])]
    assert math.isclose(recovered.flops, 9e6 * 20 * 1000)
    assert new.curve() == [(20_000, [6.0])]
    recovered.records[1]["evaluations"].insert(1, evaluated(10, 7.0))
    assert recovered.curve() == [(0, [9.0]), (10_000, [7.0]), (20_000, [4.5])], "never another seed's at some point"
    assert recovered.final() == [4.0, 4.5, 5.0]


def test_the_same_records_give_the_same_bytes(files, tmp_path):
    first, second = (report(str(files[0]), files[1], tmp_path / name) for name in ("one", "two"))
    names = ["table.md", "loss-tokens.svg", "loss-loops.svg", "loss-parameters.svg", "loss-flops.svg", "losses.svg"]
    assert [path.name for path in first] == names
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert ">plain | average<" in first[1].read_text() and "<dc:date>" not in first[1].read_text()
    # `new` has no losses by loops to draw.
    assert ">new<" not in (tmp_path / "one/loss-loops.svg").read_text()


def test_some_stages_are_plotted(files, tmp_path):
    made = {
        path.name: path.read_text() for path in report(str(files[0]), files[1], tmp_path / "one", ["recovered"])
    }
    assert ">plain | average<" in made["loss-tokens.svg"] and ">new<" not in made["loss-tokens.svg"]
    assert ">new<" in made["losses.svg"] and "| new |" in made["table.md"]
    with pytest.raises(CherryError, match=r"there is no stage 'recoverd'; did you mean 'recovered'"):
        report(str(files[0]), files[1], tmp_path / "two", ["recoverd"])
    with pytest.raises(
        CherryError, match=r"--plot averaged: .*compress-depth.*; name some of recovered, new, late$"
    ):
        report(str(files[0]), files[1], tmp_path / "two", ["recovered", "averaged"])
    assert not (tmp_path / "two").exists()


@pytest.fixture
def selective(tmp_path: Path) -> tuple[Path, Path]:
    """An experiment of selective training and its records; those of `new` are older ones, without a base."""
    stages = {name: {"verb": "pretrain", "label": f"{name} one"} for name in ("full", "semantic", "alone", "new")}
    experiment = {"about": "Does it matter?", "config": "base.yaml", "seeds": [1, 2], "stages": stages}
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    lines = [trained("new", 1, [evaluated(0, 9.0), evaluated(20, 6.0)])]
    sgt = {"marks": "semantic", "top_loss": None, "alpha": 1.0, "alpha_start": None, "alpha_steps": 0}
    for seed in (1, 2):
        full = trained("full", seed, [evaluated(0, 9.0), evaluated(20, 5.0)])
        half = [
            evaluated(0, 9.0),
            {**evaluated(20, 6.0 + seed), "parts": {"2": {"selected": 3.0, "unselected": 7.0}}},
        ]
        probes = [{"iteration": step, "coupling": {"all": {"cos": 0.1 * seed, "ratio": 2.0}}} for step in (5, 10)]
        of_sgt = {"sgt": sgt, "rho": 0.25, "probes": probes}
        lines += [
            {**full, "base": f"a{seed}"},
            {**trained("semantic", seed, half), "base": f"a{seed}", **of_sgt},
            {**trained("alone", seed, half), "base": f"b{seed}", **of_sgt},
        ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "it.yaml", tmp_path / "records.jsonl"


def test_selective_stages_are_compared_with_the_full_one_of_their_base(selective, tmp_path):
    report(str(selective[0]), selective[1], tmp_path / "report")
    text = (tmp_path / "report/table.md").read_text()
    lines = text[text.index("## Selective runs") :].splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:3] == [
        "| full one",
        "| semantic one",
    ]
    # Gains of 2 and 1 where the full run gains 4.
    assert "| 0.375 ± 0.177 (2) | 1.50 ± 0.71 (2) | 0.375 ± 0.177 (2) | 1.50 ± 0.71 (2) | 20 |" in lines[5]
    assert "| semantic one | 1 | 3.0000 ± 0.0000 (2) | 7.0000 ± 0.0000 (2) | 0.150 ± 0.071 (2) |" in text
    for seed in (1, 2):
        assert f"Not compared: alone/seed-{seed} pairs with no run of full supervision: " in text


def test_coupling_and_recovered_are_drawn_where_there_are_some(selective, tmp_path):
    drawn = {path.name: path.read_text() for path in report(str(selective[0]), selective[1], tmp_path / "report")}
    assert {"coupling-cos.svg", "coupling-ratio.svg", "recovered.svg"} <= drawn.keys()
    assert ">semantic one<" in drawn["coupling-cos.svg"] and ">full one<" not in drawn["coupling-cos.svg"]
    assert ">semantic one<" in drawn["recovered.svg"] and ">recovered fraction<" in drawn["recovered.svg"]
    some = {path.name for path in report(str(selective[0]), selective[1], tmp_path / "some", ["full"])}
    assert "recovered.svg" in some and not any(name.startswith("coupling") for name in some)


def test_each_selective_row_has_its_points(selective):
    from cherry_megatron.experiments.plots import _coupling, _recovered, figure
    from cherry_megatron.sgt.report import compare

    rows = compare(runs_of(rows_of(read(selective[0]), read_records(selective[1])))).rows
    coupling = figure(partial(_coupling, "cos"), rows, "")
    (line,) = coupling.axes[0].lines
    assert line.get_xdata().tolist() == [5, 10] and line.get_ydata() == pytest.approx([0.15, 0.15])
    lowest, highest = coupling.axes[0].collections[0].get_paths()[0].get_extents().intervaly
    assert (lowest, highest) == pytest.approx((0.1, 0.2))
    axes = figure(_recovered, rows, "").axes[0]
    for points, place in zip(axes.containers, (0, 0.25), strict=True):
        assert points[0].get_xdata() == pytest.approx([0.375]) and points[0].get_ydata() == pytest.approx([place])
        (bar,) = points[2][0].get_segments()
        assert [x for x, _ in bar] == pytest.approx([0.25, 0.5])


def test_many_rows_leave_the_axes_their_room(tmp_path):
    stages = {f"row-{n}": {"label": f"row {n}, " + "long " * 10, "verb": "pretrain"} for n in range(13)}
    experiment = {"about": "Long?", "config": "base.yaml", "seeds": [1], "stages": stages}
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    lines = [trained(name, 1, [evaluated(0, 12.0), evaluated(10, 5.0), evaluated(20, 4.0)]) for name in stages]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = rows_of(read(tmp_path / "it.yaml"), read_records(tmp_path / "records.jsonl"))
    for plot in (plots._over_tokens, plots._over_loops, plots._over_parameters, plots._over_flops):
        made = plots.figure(plot, rows)
        made.canvas.draw()
        size = made.axes[0].get_window_extent().transformed(made.dpi_scale_trans.inverted())
        assert size.width > 3.5 and size.height > 2, plot.__name__
    # The loss before the first step does not press the others flat.
    assert plots.figure(plots._over_tokens, rows).axes[0].get_ylim()[1] < 6


def test_the_command_line_needs_neither_torch_nor_the_runs(files, tmp_path):
    program = "import sys; from cherry_megatron.cli import main; main(); assert 'torch' not in sys.modules"
    arguments = ["experiment", "report", files[0], "--records", files[1], "--out", tmp_path / "report"]
    ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[0] == str(tmp_path / "report/table.md")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        ("{}", "line 1 has no stage; restore the records"),
        ('{"stage": "parent", "seed": 1}', "line 1 has no verb; restore the records"),
        ("[", "holds something else than an experiment's records"),
        ("", "has no finished training of a stage of"),
    ],
)
def test_bad_records_are_one_sentence(files, tmp_path, content, says):
    files[1].unlink()
    if content is not None:
        files[1].write_text(content)
    with pytest.raises(CherryError, match=says):
        report(str(files[0]), files[1], tmp_path / "report")
    assert not (tmp_path / "report").exists()
