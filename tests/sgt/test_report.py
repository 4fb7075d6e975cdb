"""`cherry report --sgt` against numbers counted by hand from made-up runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.document import markdown_page
from cherry_megatron.report.page import selective_report
from cherry_megatron.sgt.options import Selective
from cherry_megatron.sgt.pairs import Pair, Run, base_hash
from cherry_megatron.sgt.report import compare

SGT = {key: getattr(Selective(marks="semantic"), key) for key in Selective.__dataclass_fields__}
# Gains of 4 after 20 steps, where it is lowest, and of 3 after 40.
FULL = {0: 8.0, 20: 4.0, 40: 5.0}
GOLDEN = Path(__file__).with_name("report.md")


def coupling(cos: float, ratio: float) -> dict[str, Any]:
    return {"all": {"cos": cos, "ratio": ratio}, "ffn": {"cos": 9.0, "ratio": 9.0}}


def make_run(
    folder: Path,
    seed: int,
    losses: dict[int, float],
    sgt: dict[str, Any] | None = None,
    rho: float | None = None,
    parts: tuple[float, float] | None = None,
    probes: dict[int, dict[str, Any]] | None = None,
    **megatron: Any,
) -> Path:
    """Write a run's folder: of 2 loops, whose losses at 1 loop, and before an earlier stop, must not be read."""
    folder.mkdir(parents=True)
    config = {
        "run": str(folder),
        "recurrence": {"pattern": "*-[*-]x2*-", "loops": 2},
        **({"sgt": {**SGT, **sgt}} if sgt is not None else {}),
        "megatron": {"seed": seed, "load": f"parent/seed-{seed}", "lr": 1e-3, **megatron},
        "flags": [],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "starts.jsonl").write_text(json.dumps({"rho": rho} if rho is not None else {}) + "\n")
    last = max(losses)
    lines: list[dict[str, Any]] = [{"iteration": last, "losses": {"2": 0.1}}]
    for step, loss in losses.items():
        line: dict[str, Any] = {"iteration": step, "losses": {"1": loss - 7, "2": loss, "4": loss - 7}}
        if parts is not None:
            selected, unselected = (value + last - step for value in parts)
            line["parts"] = {"1": {}, "2": {"selected": selected, "unselected": unselected}}
        lines.append(line)
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if probes is not None:
        found = [{"iteration": step, "coupling": values} for step, values in probes.items()]
        (folder / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in found))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two seeds of full supervision, of `semantic` with alpha 1, and one of it with alpha 0.7."""
    made = []
    for seed, shift in ((1, 0.0), (2, 1.0)):
        full = {step: loss + shift for step, loss in FULL.items()}
        made.append(make_run(tmp_path / f"full-{seed}", seed, full))
    probes = {10: coupling(0.5, 1.0), 20: {}, 30: coupling(0.7, 2.0), 40: coupling(0.9, 3.0)}
    # Seed 1 gains 3 of 4 at its lowest loss, after 30 steps, and 1.5 of 3 after 40; seed 2 gains 2 of 4 and of 3.
    made.append(
        make_run(tmp_path / "one-1", 1, {0: 8.0, 30: 5.0, 40: 6.5}, {"alpha": 1.0}, 0.125, (2.0, 7.0), probes)
    )
    made.append(
        make_run(tmp_path / "one-2", 2, {0: 9.0, 40: 7.0}, {"alpha": 1.0}, 0.25, (3.0, 8.0), {40: coupling(0.8, 1)})
    )
    made.append(make_run(tmp_path / "most-1", 1, {0: 8.0, 20: 4.4, 40: 4.4}, {"alpha": 0.7}, 0.125))
    return made


def report(folders: list[Path]) -> str:
    """What `cherry report --sgt` prints."""
    return markdown_page(*selective_report(folders))


def cells(text: str, label: str) -> list[list[str]]:
    """The cells after the label and alpha of the rows of a label, those of both tables."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row[1:] for row in rows if row[0] == label]


def test_the_numbers_are_those_counted_by_hand(runs):
    text = report(runs)
    whole, _ = cells(text, "full")
    assert whole == ["-", "-", "8.5000 ± 0.7071 (2)", "4.5000 ± 0.7071 (2)", "20", "-", "-", "-", "-", "-"]
    one, most, one_beside, most_beside = cells(text, "semantic")
    # Recovered 3/4 and 2/4, efficiency 6 and 2; at step 40 1.5/3 and 2/3, 4 and 8/3.
    assert one == [
        "1", "0.125, 0.25", "8.5000 ± 0.7071 (2)", "6.0000 ± 1.4142 (2)", "30, 40",
        "0.625 ± 0.177 (2)", "4.00 ± 2.83 (2)", "0.583 ± 0.118 (2)", "3.33 ± 0.94 (2)", "40",
    ]  # fmt: skip
    # Selected 2 and 3 at the end; cos (0.5 + 0.7) / 2 up to step 30, and 0.8; at the end 0.9 and 0.8.
    assert one_beside == [
        "1", "2.5000 ± 0.7071 (2)", "7.5000 ± 0.7071 (2)",
        "0.700 ± 0.141 (2)", "0.850 ± 0.071 (2)", "1.250 ± 0.354 (2)", "2.000 ± 1.414 (2)",
    ]  # fmt: skip
    # 3.6/4 and 3.6/3: more than the full run, which has gone up again.
    assert most == [
        "0.7", "0.125", "8.0000 (1)", "4.4000 (1)", "20", "0.900 (1)", "7.20 (1)", "1.200 (1)", "9.60 (1)", "40"
    ]  # fmt: skip
    assert most_beside == ["0.7", *["-"] * 6]


def test_the_report_is_the_golden_one(runs, tmp_path):
    assert report(runs).replace(str(tmp_path), "runs") == GOLDEN.read_text()
    assert sorted(report([*reversed(runs), runs[0]]).splitlines()) == sorted(report(runs).splitlines())


def test_a_run_of_another_layout_pairs(runs, tmp_path):
    losses = {0: 8.0, 20: 5.0}
    made = make_run(tmp_path / "wide", 1, losses, {"alpha": 0.5}, 0.1, **{"tensor-model-parallel-size": 2})
    config = yaml.safe_load((made / "config.yaml").read_text())
    config["flags"] = ["--sequence-parallel", "--micro-batch-size", "1", "--expert-model-parallel-size", "2"]
    config["flags"] += ["--eval-micro-batch-size", "1"]
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    assert "| semantic | 0.5 | 0.1 |" in report([*runs, made])
    config["flags"] = ["--clip-grad", "1"]
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CherryError, match="differs in flags"):
        report([*runs, made])


def test_the_anchor_is_told_of_where_there_is_one(runs):
    assert "the anchor supervises every token" in report(runs)
    assert "the anchor supervises every token" not in report(runs[:4])


def test_an_alpha_that_stays_0_is_full_supervision(runs, tmp_path):
    marked = make_run(tmp_path / "marked", 1, FULL, {"alpha": 0.0}, 0.125, (1.0, 2.0), {40: coupling(0.25, 4)})
    only = report([marked, runs[2]])
    assert f"{runs[2]} with {marked}" in only and cells(only, "semantic")[0][5] == "-"
    both = report([marked, *runs])
    assert f"{runs[2]} with {runs[0]}" in both  # of several, the one without selection
    assert cells(both, "semantic")[3][1:5] == ["1.0000 (1)", "2.0000 (1)", "-", "0.250 (1)"]
    rising = make_run(tmp_path / "rising", 1, FULL, {"alpha": 0.5, "alpha_start": 0.0, "alpha_steps": 9}, 0.125)
    assert cells(report([runs[0], rising]), "semantic")[0][0] == "0 to 0.5 in 9 steps"


def test_an_alpha_that_falls_to_0_is_selective(runs, tmp_path):
    falling = {"alpha": 0.0, "alpha_start": 0.5, "alpha_steps": 30}
    made = make_run(tmp_path / "falling", 1, FULL, falling, 0.125)
    assert cells(report([runs[0], made]), "semantic")[0][0] == "0.5 to 0 in 30 steps"


def test_the_seed_may_be_a_flag_or_megatrons_own(tmp_path):
    full = make_run(tmp_path / "full", 1234, FULL)
    sgt = make_run(tmp_path / "sgt", 7, FULL, {"alpha": 1.0}, 0.5, load="parent/seed-1234")
    for folder, flags, seed in ((full, [], None), (sgt, ["--seed", "1234", "--bf16"], 7)):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["flags"], config["megatron"]["seed"] = flags, seed
        if seed is None:
            del config["megatron"]["seed"]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CherryError, match=r"differs in flags; train one"):
        report([full, sgt])
    config["flags"] = ["--seed=1234"]
    (sgt / "config.yaml").write_text(yaml.safe_dump(config))
    assert cells(report([full, sgt]), "semantic")[0][5] == "1.000 (1)"


def test_shuffled_text_pairs_with_shuffled_text(runs, tmp_path):
    made = [
        make_run(tmp_path / "s-full", 1, FULL),
        make_run(tmp_path / "s-one", 1, {0: 8.0, 40: 7.0}, {"alpha": 1.0}, 0.125),
    ]
    for folder in made:
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {"data": {"shuffle": "words"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = report([*runs, *made])
    assert f"{made[1]} with {made[0]}" in text
    assert cells(text, "semantic, words shuffled")[0][5:7] == ["0.250 (1)", "2.00 (1)"]
    with pytest.raises(CherryError, match=r"differs in data\.shuffle"):
        report([runs[0], made[1]])


def test_runs_pair_whatever_loader_they_read_by(runs, tmp_path):
    by_dali = make_run(tmp_path / "by-dali", 1, {0: 8.0, 40: 7.0}, {"alpha": 1.0}, 0.125)
    config = yaml.safe_load((by_dali / "config.yaml").read_text())
    config["data"] = {"shuffle": "none", "prefix": 0, "loader": "dali"}
    (by_dali / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"{by_dali} with {runs[0]}" in report([runs[0], by_dali])


def test_a_run_that_never_gains_recovers_nothing(runs, tmp_path):
    worse = make_run(tmp_path / "worse", 1, {0: 8.0, 20: 9.0, 40: float("nan")}, {"alpha": 1.0}, 0.5)
    row = cells(report([runs[0], worse]), "semantic")[0]
    assert row[4:7] == ["0", "0.000 (1)", "0.00 (1)"] and row[7] == "nan (1)"


def test_equal_steps_at_which_the_full_run_has_lost_all_say_nothing(tmp_path):
    full = make_run(tmp_path / "full", 1, {0: 8.0, 20: 4.0, 40: 9.0})
    one = make_run(tmp_path / "one", 1, {0: 8.0, 20: 6.0, 40: 6.0}, {"alpha": 1.0}, 0.5)
    assert cells(report([full, one]), "semantic")[0][5:] == ["0.500 (1)", "1.00 (1)", "-", "-", "40"]


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def first_evaluation(folder: Path, **changes: Any) -> None:
    path = folder / "evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{**line, **changes} if line["iteration"] == 0 else line for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda full, one: without(one, "config.yaml"), "one-1 has no config.yaml, so it is no run's folder"),
        (lambda full, one: without(one, "starts.jsonl"), "one-1 has no starts.jsonl, so no training has begun"),
        (lambda full, one: without(one, "evaluations.jsonl"), "one-1 has no evaluations.jsonl, so there"),
        (lambda full, one: (one / "config.yaml").write_text("a: 1"), "one-1 does not hold what a run writes"),
        (
            lambda full, one: first_evaluation(one, iteration=5),
            "one-1 has no evaluation at step 0; train it with evaluation.at_start: true",
        ),
        (
            lambda full, one: first_evaluation(full, losses={"1": 8.0}),
            "full-1 has no evaluation at step 0; train it with evaluation.at_start: true",
        ),
        (
            lambda full, one: first_evaluation(one, losses={"2": 8.002}),
            "have losses of 8.0020 and 8.0000 at step 0: they were evaluated on other texts",
        ),
        (
            lambda full, one: [first_evaluation(run, losses={"2": 3.0}) for run in (full, one)],
            "full-1, which has full supervision, never fell below its loss of 3.0000 at step 0",
        ),
        (
            lambda full, one: (full / "config.yaml").write_text(
                (full / "config.yaml").read_text().replace("lr: 0.001", "lr: 0.002")
            ),
            "one-1 pairs with no run of full supervision: the nearest, {0}/full-1, differs in megatron.lr;",
        ),
        (lambda full, one: (one / "starts.jsonl").write_text("{}\n"), "one-1 tells of no rho"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence(runs, tmp_path, change, says):
    full, one = runs[0], runs[2]
    change(full, one)
    with pytest.raises(CherryError) as error:
        report([full, runs[1], one])
    assert says.format(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_runs_without_a_pair_or_twice_are_named(runs, tmp_path):
    with pytest.raises(CherryError, match="none of these runs is selective"):
        report(runs[:2])
    with pytest.raises(CherryError, match="pairs with no run: none of them has full supervision"):
        report(runs[2:])
    with pytest.raises(CherryError, match=r"full-2, differs in megatron\.load, megatron\.seed;"):
        report([runs[1], runs[2]])
    other = {"load": "another/seed-1"}
    again = [
        make_run(tmp_path / "full-again", 1, FULL, **other),
        make_run(tmp_path / "one-again", 1, FULL, {"alpha": 1.0}, 0.125, **other),
    ]
    with pytest.raises(CherryError, match=r"are two runs with seed 1 that differ in megatron\.load"):
        report([*runs, *again])


def test_the_command_line_prints_or_writes_without_torch(runs, tmp_path):
    program = "import sys; from cherry_megatron.cli import main; status = main(); "
    program += "assert 'torch' not in sys.modules; sys.exit(status)"

    def cherry(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, "report", "--sgt", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert cherry(*runs).stdout == report(runs)
    assert cherry(*runs, "--out", tmp_path / "new").returncode == 0
    assert (tmp_path / "new/report.md").read_text() == report(runs)
    assert "<h1>Selective runs</h1>" in (tmp_path / "new/report.html").read_text()
    refused = cherry(*runs, "--out", runs[0] / "config.yaml")
    assert refused.returncode == 2 and f"cannot write {runs[0]}/config.yaml: " in refused.stderr


def made_up(
    label: str, seed: int, base: str, losses: list[float], rho: float | None, alpha: float | None = None
) -> Run:
    sgt = None if alpha is None else {**SGT, "alpha": alpha}
    evaluations = [{"iteration": 10 * place, "losses": {"2": loss}} for place, loss in enumerate(losses)]
    return Run(f"{label}/{seed}", label, label, seed, {"base": base}, sgt, rho, 2, evaluations, [])


losses = st.lists(st.floats(0.5, 9.5), min_size=1, max_size=5)


@given(full=losses, one=losses, rho=st.floats(0.01, 1.0))
def test_recovered_is_the_share_of_the_full_runs_gain(full, one, rho):
    full = [10.0, *full]
    pair = Pair(made_up("one", 1, "a", [10.0, *one], rho, 1.0), made_up("full", 1, "a", full, None))
    assert pair.recovered == pytest.approx((10 - min(one)) / (10 - min(full)))
    assert pair.efficiency * rho == pytest.approx(pair.recovered)
    last = min(len(full) - 1, len(one))
    assert pair.last_step == 10 * last
    assert pair.recovered_at_last_step == pytest.approx((10 - one[last - 1]) / (10 - full[last]))
    assert Pair(pair.full, pair.full).recovered == 1.0


def test_rows_are_over_the_seeds_that_can_be_compared():
    runs = [
        *(made_up("full", seed, f"a{seed}", [8.0, 4.0], None) for seed in (1, 2)),
        *(made_up("one", seed, f"a{seed}", [8.0, 5.0 + seed], 0.5, 1.0) for seed in (1, 2, 3)),
        made_up("parent", 1, "b", [9.0, 8.0], None),
    ]
    compared = compare(runs)
    assert [(row.label, row.each(lambda pair: pair.recovered)) for row in compared.rows] == [
        ("full", [1.0, 1.0]),
        ("one", [0.5, 0.25]),
    ]
    (problem,) = compared.problems
    assert problem.startswith("one/3 pairs with no run of full supervision")


def test_what_one_seed_lacks_is_left_out_for_all():
    runs = [made_up("full", seed, f"a{seed}", [8.0, 4.0], None) for seed in (1, 2)]
    for seed, steps in ((1, (5, 10)), (2, (10, 15))):
        probes = [{"iteration": step, "coupling": coupling(seed + step, 1.0)} for step in steps]
        one = made_up("one", seed, f"a{seed}", [8.0, 5.0], 0.5, 1.0)
        runs.append(replace(one, probes=probes if seed == 1 else [*probes, {"iteration": 5, "coupling": {}}]))
    row = compare(runs).rows[1]
    assert row.coupling("cos") == [(10, [11.0, 12.0])]
    assert row.each(lambda pair: pair.run.last_coupling("cos")) == [11.0, 17.0]
    whole = compare([*runs[:3], replace(runs[3], probes=[])]).rows[1]
    assert whole.coupling("cos") == [] and whole.each(lambda pair: pair.run.last_coupling("cos")) == []


def test_the_base_is_what_a_pair_has_in_common(tmp_path):
    config = {"run": "a", "data": {"shuffle": "none"}, "megatron": {"seed": 1, "load": f"{tmp_path}/parent"}}
    known = base_hash(config, tmp_path)
    assert base_hash({**config, "run": "b", "sgt": {"alpha": 1}, "generation": {}}, tmp_path) == known
    moved = {**config, "megatron": {"load": "elsewhere/parent", "seed": 1}}
    assert base_hash(moved, Path("elsewhere")) == known
    others = [
        {**config, "data": {"shuffle": "words"}},
        {**config, "megatron": {**config["megatron"], "seed": 2}},
        {**config, "megatron": {**config["megatron"], "load": "/parent"}},
    ]
    assert known not in [base_hash(other, tmp_path) for other in others]
