"""Two evaluations item by item: the statistics against scipy's, and what does not compare."""

import json
import math
import random
from pathlib import Path

import pytest
from scipy import stats

from cherry_megatron.errors import CherryError
from cherry_megatron.harness.compare import compare, paired


def item(number: int, acc: float, prompt: str = "질문", **metrics) -> dict:
    return {
        "doc_id": number, "filter": "none", "doc_hash": f"h{number}", "doc": {}, "target": 1,
        "arguments": [(f"{prompt} {number}", " 가"), (f"{prompt} {number}", " 나")],
        "filtered_resps": [(-1.0, False), (-2.0, True)], "metrics": ["acc", *metrics], "acc": acc, **metrics,
    }  # fmt: skip


def keep(folder: Path, samples: dict, groups=None, fewshot=None, loops=4) -> Path:
    pytest.importorskip("lm_eval")
    from cherry_megatron.harness.results import write

    found = {"results": {task: {} for task in samples}, "group_subtasks": groups or {}, "samples": samples}
    asked = {"tasks": list(samples), "limit": None, "fewshot": fewshot}
    return write(folder, {"iteration": 20, "loops": loops}, asked, found)


def test_statistics_are_scipys():
    draw = random.Random(5)
    values = [(draw.random(), draw.random()) for _ in range(50)]
    a, b = zip(*values, strict=True)
    found = paired(values)
    assert found.error == pytest.approx(stats.sem([y - x for x, y in values]), rel=1e-12)
    assert found.difference / found.error == pytest.approx(stats.ttest_rel(b, a).statistic, rel=1e-12)
    low, high = stats.norm.interval(0.95, found.difference, found.error)
    assert found.interval == pytest.approx((low, high), rel=1e-6)
    assert found.p is None


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (9, 2), (30, 30), (3, 400)])
def test_mcnemar_is_the_binomial_test(better, worse):
    found = paired([(0.0, 1.0)] * better + [(1.0, 0.0)] * worse + [(1.0, 1.0)] * 5)
    assert (found.better, found.worse) == (better, worse)
    wanted = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert found.p == pytest.approx(wanted, rel=1e-9)


def test_one_item_has_no_error():
    assert math.isnan(paired([(0.0, 1.0)]).error)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    before = [1, 1, 0, 0, 1, 0, 0, 0]
    after = [1, 0, 1, 1, 1, 0, 1, 0]
    groups = {"both": ["one", "part"], "part": ["other"], "one": [], "other": []}
    folders = []
    for name, values in (("a", before), ("b", after)):
        samples = {"one": [item(n, v, f1=[n, v]) for n, v in enumerate(values)], "other": [item(0, values[1])]}
        keep(tmp_path / name, samples, groups)
        folders.append(tmp_path / name)
    return folders[0], folders[1]


def test_what_is_printed(two):
    lines = compare(*two)
    assert lines[0].startswith(f"A  {two[0]}/tasks/")
    assert lines[0].endswith("iteration 20, loops 4")
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert rows["one"][1:7] == ["acc", "8", "0.3750", "0.6250", "+0.2500", "-0.2400"]
    assert rows["one"][-3:] == ["3", "1", "0.625"]
    assert rows["both"][1:5] == ["acc", "9", "0.4444", "0.5556"]
    assert rows["part"][1:5] == rows["other"][1:5] == ["acc", "1", "1.0000", "0.0000"]
    assert rows["all tasks"][2:4] == ["acc", "9"]
    assert not any("f1" in line for line in lines)
    assert "5 items changed (metric, task, item: A -> B)" in lines
    assert lines[-5].split() == ["acc", "one,", "1:", "1", "->", "0", "질문", "1"]


def test_changed_items_in_a_file(two, tmp_path):
    compare(*two, tmp_path / "changed.jsonl")
    changed = [json.loads(line) for line in (tmp_path / "changed.jsonl").read_text().splitlines()]
    assert [(line["task"], line["item"], line["A"], line["B"]) for line in changed] == [
        ("one", 1, 1, 0), ("one", 2, 0, 1), ("one", 3, 0, 1), ("one", 6, 0, 1), ("other", 0, 1, 0),
    ]  # fmt: skip
    assert changed[0]["answers of A"] == [[-1.0, False], [-2.0, True]]


def test_the_newest_of_a_run_or_one_by_its_folder(two):
    first = next((two[0] / "tasks").iterdir())
    assert f"B  {first}, iteration 20, loops 4" in compare(two[1], first)


def test_other_prompts_are_told(tmp_path):
    keep(tmp_path / "a", {"one": [item(0, 1.0)]})
    keep(tmp_path / "b", {"one": [item(0, 1.0, prompt="예")]}, fewshot=2)
    assert "note: the prompts of A and B are not the same" in compare(tmp_path / "a", tmp_path / "b")


def refused(a: Path, b: Path) -> str:
    with pytest.raises(CherryError) as error:
        compare(a, b)
    return str(error.value)


def test_what_does_not_compare(two, tmp_path):
    a, b = two
    assert refused(a, tmp_path) == (
        f"{tmp_path} holds no evaluation on tasks; make one with `cherry evaluate --tasks`"
    )
    keep(tmp_path / "third", {"third": [item(0, 1.0)]})
    assert "have no task in common" in refused(a, tmp_path / "third")
    keep(tmp_path / "fewer", {"one": [item(0, 1.0)]})
    assert "were not asked the same items of one" in refused(a, tmp_path / "fewer")
    folder = next((b / "tasks").iterdir())
    (folder / "results.json").write_text("{")
    assert refused(a, b).startswith(f"{folder}/results.json is no record of an evaluation")
    (folder / "results.json").write_text('{"model": {}, "asked": {}, "results": {}}')
    assert refused(a, b).startswith(f"{folder}/results.json is no record of an evaluation")
    (folder / "results.json").write_text('{"model": {}, "asked": {"fewshot": null}, "results": {}}')
    (folder / "samples.jsonl").write_text('{"task": "one"}\n')
    assert refused(a, b) == f"{folder}/samples.jsonl: line 1 is no item of a task; evaluate again"
    (folder / "samples.jsonl").unlink()
    assert refused(a, b) == f"{folder} has no samples.jsonl; evaluate again"
