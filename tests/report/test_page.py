"""`cherry report` of runs' folders and of experiments' records: what it says, and how it looks in a browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import cherry_megatron
from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.document import Plot, markdown_page
from cherry_megatron.report.figures import expert_map, over_steps, thinned
from cherry_megatron.report.page import report, write
from cherry_megatron.report.sources import Folder, read_sources
from cherry_megatron.sgt.options import Selective
from tests.browser import browser, colours
from tests.conftest import TINY

SGT = {key: getattr(Selective(top_loss=0.5), key) for key in Selective.__dataclass_fields__}
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def generated(texts: list[tuple[str, str]]) -> dict[str, Any]:
    shown = [{"prompt": prompt, "continuation": text, "health": {}} for prompt, text in texts]
    return {"iteration": 20, "health": {"distinct-1": 0.5, "ended": 0.25}, "texts": shown}


@pytest.fixture
def make_run(tmp_path):
    """Write a run's folder of 20 steps of 8 x 32 tokens, with `losses` after 0, 10, 20 steps, or without any."""

    def make(name: str, seed: int, losses: list[float], **sections: Any) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        data = {"tokenizer-model": "tokenizer", "data-path": ["text"]}
        config = {
            "run": str(folder),
            "recurrence": {"pattern": "*-[*-*-]x3*-", "loops": 3},
            **sections,
            "megatron": {**TINY, **data, "seed": seed, **sections.get("megatron", {})},
            "flags": [],
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        start = {"command": "cherry pretrain", "git": {"commit": "abc"}, "world_size": 2, "device": "NVIDIA H100"}
        write_lines(folder / "starts.jsonl", [start])
        steps = [
            {"iteration": step, "loss": 9.0 / step, "grad_norm": 0.5, "learning_rate": 1e-3, "seconds": 0.25}
            for step in range(1, 21)
        ]
        steps[6] |= {"loss": None, "skipped": "the loss is nan"}
        write_lines(folder / "steps.jsonl", steps)
        if losses:
            evaluations = [
                {"iteration": 10 * place, "losses": {"1": loss + 1, "2": loss + 0.5, "3": loss}}
                for place, loss in enumerate(losses)
            ]
            write_lines(folder / "evaluations.jsonl", evaluations)
        return folder

    return make


@pytest.fixture
def runs(make_run) -> list[Path]:
    """Two seeds of one training, one of which had an alarm and wrote texts, and one that was not evaluated."""
    made = [make_run("base/seed-1", 1, [7.0, 5.0, 4.0]), make_run("base/seed-2", 2, [7.0, 5.5, 4.5])]
    made.append(make_run("other", 1, [], megatron={"lr": 0.1}))
    alarm = {"time": "2026-11-22", "iteration": 7, "kind": "skip", "text": "the loss of step 7 is nan: skipped"}
    write_lines(made[1] / "alarms.jsonl", [alarm])
    write_lines(made[1] / "generations.jsonl", [generated([("오늘", "날씨가 | <b>좋다</b>")])])
    parents = {"operation": "compress-depth", "identity": "2" * 64, "path": "/x/runs/small", "parents": []}
    parents["options"] = {"method": "average", "groups": "adjacent"}
    saved = made[0] / "checkpoints/iter_0000020"
    saved.mkdir(parents=True)
    (saved / ".metadata").touch()
    (saved.parent / "latest_checkpointed_iteration.txt").write_text("20")
    record = {"operation": "pretrain", "identity": "1" * 64, "iteration": 20, "parents": [parents]}
    (saved / "lineage.json").write_text(json.dumps(record))
    return made


def section(text: str, title: str) -> str:
    return text[text.index(f"## {title}\n") :].split("\n## ")[0]


def test_runs_by_hand(runs):
    text = markdown_page(*report(runs))
    assert text.startswith("# Report of 3 runs\n") and "2 training(s), 3 with all seeds" in text
    assert "| base | 1, 2 |" not in text
    stages = section(text, "Stages")
    assert "| base | pretrain | runs/small | - | 1, 2 | 20 | 5.12k | 2 x NVIDIA H100 | 10 s |" in stages
    assert "| other | pretrain | - | - | 1 | 20 | 5.12k |" in stages
    lineage = section(text, "Lineage")
    assert "| `base/seed-1` | pretrain | 20 | 111111111111 |" in lineage
    assert "| · runs/small | compress-depth | - | 222222222222 | - | - | average, groups adjacent |" in lineage
    # 4.0 and 4.5: mean 4.25, deviation 0.5 / sqrt(2).
    losses = section(text, "Losses")
    assert (
        "| 5.12k | 7.0000 ± 0.0000 (2) | 8.0000 ± 0.0000 (2) | 4.2500 ± 0.3536 (2) | 5.2500 ± 0.3536 (2) |"
        in losses
    )
    loops = section(text, "Loops")
    assert "| base | 5.2500 ± 0.3536 (2) | 4.7500 ± 0.3536 (2) | 4.2500 ± 0.3536 (2) |" in loops
    # 8 x 32 tokens in a quarter of a second.
    assert re.search(
        r"\| base \| 2 x NVIDIA H100 \| 0\.25 \| 1,024 \| \S+ \| 0\.0% \| - \|", section(text, "Speed")
    )
    health = section(text, "Health")
    assert "| base/seed-2 | 20 | 1 | 1 skip | 1 | - |" in health and "| other | 20 | 1 | none | 1 | - |" in health
    assert "base/seed-2, step 7: the loss of step 7 is nan: skipped" in health
    assert "| base/seed-2 | 오늘 | 날씨가 \\| \\<b>좋다\\</b> |" in section(text, "Generated texts")
    assert "| not run |" in section(text, "Claims of the paper") and "Selective supervision" not in text


def test_runs_of_another_text_are_told(runs, make_run):
    assert "evaluated on different text" not in markdown_page(*report(runs))
    other = make_run("shorter", 1, [7.0], megatron={"seq-length": 16, "max-position-embeddings": 16})
    assert "evaluated on different text" in markdown_page(*report([*runs, other]))


def test_selective_runs_stand_beside_full_ones(make_run):
    full = make_run("full", 1, [9.0, 7.0, 5.0])
    one = make_run("one", 1, [9.0, 7.0, 6.0], sgt=SGT | {"top_loss": 0.25, "alpha": 0.5})
    write_lines(one / "starts.jsonl", [json.loads((one / "starts.jsonl").read_text()) | {"rho": 0.25}])
    text = section(markdown_page(*report([full, one])), "Selective supervision")
    assert "| top loss online, 0.25 | 0.5 | 0.25 | 9.0000 (1) | 6.0000 (1) | 20 | 0.750 (1) | 3.00 (1) |" in text
    assert "![What selective runs recover" in text


def test_both_forms_are_written_whole_and_alike(runs, tmp_path):
    first, second = (write(tmp_path / name, *report(runs)) for name in ("one", "two"))
    assert [path.name for path in first][:2] == ["report.html", "report.md"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    page, text = first[0].read_text(), first[1].read_text()
    files = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert {*files} == {path.name for path in first[2:]} and page.count("<svg") == len(files) >= 6
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "the page needs something from elsewhere"
    assert "@import" not in page and "<script" not in page and "url(" not in re.sub(r"url\(#", "", page)


def test_experiments_and_runs_on_one_page(runs):
    title, found = report([RESULTS / "2026-11-22-depth/records.jsonl", *runs])
    text = markdown_page(title, found)
    assert title == "Report of 2026-11-22-depth, 3 runs"
    assert "### 2026-11-22-depth" in text and "### 3 runs" in text
    lineage = (
        "average, distilled (taught by 48 layers) ← start-average (compress-depth: average, adjacent) ← 48 layers"
    )
    assert lineage in text
    assert "| average, distilled | pretrain | start-average | 48 layers | 1, 2, 3 | 900 | 14.7M |" in text
    # The seeds' medians are 0.1546, 0.2309 and 0.2638 s; 16,384 tokens a step.
    assert "| average, distilled | 1 x NVIDIA H100 80GB HBM3 | 0.2309 | 70,943 |" in text
    plots = [block.file for part in found for block in part.blocks if isinstance(block, Plot)]
    assert len(plots) == len(set(plots)) and "2026-11-22-depth-loss-tokens.svg" in plots
    # Of 29 trainings those with three seeds.
    (curves,) = [
        b.svg for part in found for b in part.blocks if getattr(b, "file", "") == "2026-11-22-depth-loss-loops.svg"
    ]
    assert ">average, distilled<" in curves and ">average, sequence order<" not in curves
    some = report([RESULTS / "2026-11-22-depth"], ["sequence"])[1]
    (curves,) = [b.svg for part in some for b in part.blocks if getattr(b, "file", "") == "loss-loops.svg"]
    assert ">average, sequence order<" in curves and ">average, distilled<" not in curves


def folder(steps: list[dict[str, Any]]) -> Folder:
    return Folder("one", steps, [], [], [], [], None, "")


def test_experiments_of_one_name_keep_their_own_plots(tmp_path):
    records = RESULTS / "2026-11-30-moee/records.jsonl"
    for before, name in (("first", "records"), ("second", "records"), ("second", "older")):
        (tmp_path / before / "moee").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(records, tmp_path / before / "moee" / f"{name}.jsonl")
    first, second = tmp_path / "first/moee", tmp_path / "second/moee"
    names = [source.name for source in read_sources([first, second, second / "older.jsonl"])]
    assert names == ["first/moee", "second/moee", "second/moee/older"]
    _, found = report([first, first / "records.jsonl", second])
    files = [block.file for section in found for block in section.blocks if isinstance(block, Plot)]
    assert len(files) == len(set(files)) == 2 * sum(file.startswith("first-moee-") for file in files) > 0


def test_long_curves_are_means_of_neighbours():
    points = [(float(step), float(step % 2)) for step in range(1, 1001)]
    found = thinned(points, 300)
    assert len(found) == 250 and found[0] == (2.5, 0.5) and found[-1] == (998.5, 0.5)
    assert thinned(points[:3], 300) == points[:3] and thinned([], 300) == []


def test_what_no_step_has_is_not_drawn():
    steps = [{"iteration": 1, "loss": None}, {"iteration": 2, "loss": 3.0}]
    assert over_steps("a.svg", "", "", [folder(steps[:1])], lambda step: step["loss"]) == []
    assert ">one<" in over_steps("a.svg", "", "", [folder(steps)], lambda step: step["loss"])[0].svg
    assert expert_map("a.svg", folder(steps)) == []


def test_a_map_of_experts():
    of_layers = {f"load/layer-{layer}/{expert}": 0.25 for layer in (2, 3) for expert in range(4)}
    steps = [{"iteration": n, "moee": {**of_layers, "load/layer-2/loop-1/0": 1.0}} for n in range(1, 9)]
    (plot,) = expert_map("a.svg", folder(steps))
    rows = re.findall(r">(layer-\d, expert \d)<", plot.svg)
    assert len(rows) == 8 and plot.caption.startswith("one: load of each expert")
    explained = [
        {"iteration": n, "moee": {"load/0": 1.0, "responsibility/0": 0.5, "responsibility/1": 0.5}} for n in (1, 2)
    ]
    (plot,) = expert_map("a.svg", folder(explained))
    assert re.findall(r">(expert \d)<", plot.svg) == ["expert 0", "expert 1"]


def test_an_empty_run_and_what_is_none(runs, tmp_path):
    broken = tmp_path / "runs/broken"
    shutil.copytree(runs[2], broken)
    write_lines(broken / "steps.jsonl", [{"iteration": 1}])
    (tmp_path / "text.jsonl").write_text("hello")
    empty = tmp_path / "empty"
    shutil.copytree(runs[2], empty)
    (empty / "steps.jsonl").write_text("")
    for path, says in (
        (tmp_path / "none", "there is no {0}; name the folder of a run, or records.jsonl"),
        (tmp_path, "{0} has no config.yaml, so it is no run's folder"),
        (broken, "{0} does not hold what a run writes (KeyError: 'seconds')"),
        (tmp_path / "text.jsonl", "{0} holds something else than an experiment's records"),
        (empty, "{0}/steps.jsonl has no step"),
    ):
        with pytest.raises(CherryError) as error:
            report([path])
        assert says.format(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(
        CherryError, match=r"--plot nothing: there is no such training; those are base/seed-1, base"
    ):
        report(runs, ["nothing"])
    (runs[2] / "steps.jsonl").unlink()
    with pytest.raises(CherryError, match=r"other has no steps\.jsonl, so no training has made a step there"):
        report(runs)


def test_records_of_an_experiment_that_has_not_trained(tmp_path):
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(CherryError, match="has no finished training; let the experiment go on"):
        read_sources([tmp_path])


def test_a_flag_that_would_do_nothing_is_refused(capsys):
    assert main(["report", "a", "--sgt", "--plot", "b"]) == 2
    assert "--sgt has none; take one out" in capsys.readouterr().err


def test_the_command_line_reads_records_without_torch(tmp_path):
    program = "import sys; from cherry_megatron.cli import main; status = main(); "
    program += "assert 'torch' not in sys.modules; sys.exit(status)"

    def cherry(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, "report", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    records = RESULTS / "2026-11-22-sgt/records.jsonl"
    printed = cherry(records)
    assert printed.stdout == markdown_page(*report([records])) and printed.returncode == 0
    made = cherry(records, "--out", tmp_path / "new/report").stdout.splitlines()
    assert made[:2] == [str(tmp_path / f"new/report/report.{kind}") for kind in ("html", "md")]
    assert Path(made[1]).read_text() == printed.stdout
    (tmp_path / "file").touch()
    with pytest.raises(CherryError, match=f"cannot write {tmp_path}/file: "):
        write(tmp_path / "file", "", [])


def test_the_page_in_a_browser(runs, tmp_path):
    written = write(tmp_path / "report", *report([*runs, RESULTS / "2026-11-22-sgt"]))
    with browser() as page:
        page.open(written[0].as_uri())
        text = page.wait_for(["Claims of the paper", "semantic, alpha 0.7", "Gradient norm before clipping"])
        for words in (
            "reproduced",
            "not run",
            "held-out loss, nats a token",
            "<b>좋다</b>",
            "tokens shuffled, random",
        ):
            assert words in text
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= page.evaluate("window.innerWidth"), "the page is wider than the window"
        heights = page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
        )
        assert len(heights) >= 12 and min(heights) > 60
        page.screenshot(tmp_path / "page.png", 1100, 6000)
    found = colours(tmp_path / "page.png")
    whole = sum(found.values())
    assert 0.5 < found[255, 255, 255] / whole < 0.99 and len(found) > 100
    # The first colours of the plots: curves were drawn.
    assert all(found.get(colour, 0) > 50 for colour in ((0, 114, 178), (213, 94, 0)))


def test_nothing_but_the_command_line_knows_of_reports():
    """What they are made with, tables and plots, lies below: in `monitor`, where other rooms may have it too."""
    package = Path(cherry_megatron.__file__).parent
    users = [path.parent.name for path in package.rglob("*.py") if "cherry_megatron.report" in path.read_text()]
    assert {*users} == {"report", "verbs"}
