"""Tasks that the harness ships and tasks of a folder, with data that lie in it; what is missing is told."""

import json
from pathlib import Path

import pytest

from cherry_megatron.errors import CherryError
from tests.harness.conftest import TASKS

pytest.importorskip("lm_eval")

# Data set, its part and splits -> one item, as the harness' YAML files read them.
DATA = {
    ("HAERAE-HUB/KMMLU", "Accounting", ("dev", "test")): {
        "question": "가장 큰 수는?", "A": "1", "B": "2", "C": "4", "D": "3", "answer": 3,
    },
    ("HAERAE-HUB/HAE_RAE_BENCH", "history", ("test",)): {"query": "질문: 나라는? 정답:", "answer": "(C)"},
    ("skt/kobest_v1", "boolq", ("train", "validation", "test")): {
        "paragraph": "물은 얼면 얼음이 된다.", "question": "얼음은 물인가?", "label": 1,
    },
    ("cais/mmlu", "anatomy", ("dev", "test")): {
        "question": "How many hands?", "choices": ["one", "three", "two", "four"], "answer": 2,
    },
}  # fmt: skip
NAMES = ["kmmlu_accounting", "haerae_history", "kobest_boolq", "mmlu_anatomy"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (path, part, splits), item in DATA.items():
        place = tmp_path / path / part
        place.mkdir(parents=True)
        for split in splits:
            lines = [json.dumps({**item, "number": n}, ensure_ascii=False) for n in range(6)]
            (place / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def load(names, folder, fewshot=None):
    from cherry_megatron.harness.tasks import load_tasks

    return load_tasks(names, folder, fewshot, folder / "cache")


def answers(tasks, limit=None):
    """Scores of a model that finds the third choice, or the second of two, likeliest."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    asked = []

    class Third(LM):
        def loglikelihood(self, requests):
            asked.extend(request.args for request in requests)
            of_two = {" 예", "예"}
            chosen = {" C", " (C)", *of_two, " two"}
            return [(0.0 if continuation in chosen else -1.0, False) for _, continuation in self._args(requests)]

        def _args(self, requests):
            return [request.args for request in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        generate_until = loglikelihood_rolling

    found = evaluate(Third(), tasks, limit=limit, bootstrap_iters=0)
    return found["results"], asked


def test_the_four_benchmarks_are_asked_offline(folder):
    results, asked = answers(load(NAMES, folder))
    assert results["kmmlu_accounting"]["acc,none"] == 1
    assert results["haerae_history"]["acc,none"] == 1
    assert results["mmlu_anatomy"]["acc,none"] == 1
    assert results["kobest_boolq"]["acc,none"] == results["kobest_boolq"]["f1,none"] == 1
    assert ("가장 큰 수는?\nA. 1\nB. 2\nC. 4\nD. 3\n정답：", " A") in asked


def test_examples_and_limits(folder):
    _, asked = answers(load(["kmmlu_accounting"], folder, fewshot=2), limit=3)
    assert len(asked) == 3 * 4
    assert all(prompt.count("정답：") == 3 and prompt.count("정답： C\n\n") == 2 for prompt, _ in asked)
    with pytest.raises(CherryError, match="--fewshot 7: the task kmmlu_accounting has 6 examples; use fewer"):
        load(["kmmlu_accounting"], folder, fewshot=7)
    with pytest.raises(CherryError, match="--fewshot 6: the task haerae_history has 6 examples"):
        load(["haerae_history"], folder, fewshot=6)  # they are the questions themselves


@pytest.mark.parametrize("form", ["parquet", "csv", "json"])
def test_other_forms_of_data(form, folder):
    import pandas

    place = folder / "HAERAE-HUB/KMMLU/Accounting"
    for split in ("dev", "test"):
        table = pandas.read_json(place / f"{split}.jsonl", lines=True)
        if form == "json":
            (place / f"{split}.jsonl").rename(place / f"{split}.json")
            continue
        getattr(table, f"to_{form}")(place / f"{split}.{form}", index=False)
        (place / f"{split}.jsonl").unlink()
    assert answers(load(["kmmlu_accounting"], folder))[0]["kmmlu_accounting"]["acc,none"] == 1


def test_a_copy_of_a_data_set_with_its_card(folder):
    whole = folder / "HAERAE-HUB/KMMLU"
    for split in ("dev", "test"):
        (whole / f"data-{split}.jsonl").write_text((whole / f"Accounting/{split}.jsonl").read_text())
        (whole / f"Accounting/{split}.jsonl").unlink()
    (whole / "README.md").write_text(
        "---\nconfigs:\n- config_name: Accounting\n  data_files:\n  - split: dev\n    path: data-dev.jsonl\n"
        "  - split: test\n    path: data-test.jsonl\n---\n"
    )
    assert answers(load(["kmmlu_accounting"], folder))[0]["kmmlu_accounting"]["acc,none"] == 1
    (whole / "README.md").write_text("no card")
    with pytest.raises(CherryError, match="the task kmmlu_accounting cannot be read"):
        load(["kmmlu_accounting"], folder)


def test_data_that_are_not_there(folder):
    (folder / "HAERAE-HUB/KMMLU/Accounting/dev.jsonl").unlink()
    place = folder / "HAERAE-HUB/KMMLU"
    with pytest.raises(CherryError) as refused:
        load(["kmmlu_accounting"], folder)
    assert str(refused.value) == (
        f"the data of the task kmmlu_accounting are not in {folder}: put test.jsonl, dev.jsonl (or .parquet, .csv) "
        f"of HAERAE-HUB/KMMLU, Accounting, into {place}/Accounting, or a copy of the data set with its README.md "
        f"into {place}"
    )
    with pytest.raises(CherryError, match=r"the data of the task kmmlu_\w+ are not in"):
        load(["kmmlu"], folder)  # a group of all subjects


def test_unknown_tasks_and_folders(folder, monkeypatch):
    from cherry_megatron.harness import tasks

    monkeypatch.setattr(tasks, "SHIPPED", tasks.SHIPPED / "haerae")  # all of them take 12 s to read
    with pytest.raises(CherryError, match=r"cherry_kk is neither in .*; did you mean 'cherry_ko'"):
        load(["cherry_kk"], TASKS)
    with pytest.raises(CherryError) as refused:
        load(["xyzzy"], TASKS)
    assert str(refused.value) == (
        f"--tasks: xyzzy is neither in {TASKS} nor among the harness' own tasks; {TASKS} has cherry_ko, "
        "cherry_ko_speak, cherry_ko_text, and `lm-eval ls tasks` lists the harness' own"
    )
    with pytest.raises(CherryError, match=rf"xyzzy is neither.*; {folder} has none, and `lm-eval ls tasks` lists"):
        load(["xyzzy"], folder)
    with pytest.raises(CherryError, match=r"--task-dir .*nowhere is no folder"):
        load(["cherry_ko"], folder / "nowhere")
    with pytest.raises(CherryError, match=r"the harness cannot load them: Duplicate task 'haerae_history'"):
        (folder / "pair.yaml").write_text("group: pair\ntask: [haerae_history]\n")
        load(["pair", "haerae_history"], folder)


def test_a_task_whose_file_is_gone(tmp_path):
    (tmp_path / "cherry_ko.yaml").write_text((TASKS / "cherry_ko.yaml").read_text())
    with pytest.raises(CherryError, match=rf"cherry_ko are not there: .* names {tmp_path}/cherry_ko.jsonl"):
        load(["cherry_ko"], tmp_path)


def test_the_repository_s_own_questions():
    files = [TASKS / f"{name}.jsonl" for name in ("cherry_ko", "cherry_ko_dev")]
    items = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(items) == len({item["question"] for item in items}) == 48
    assert all(len({*item["choices"]}) == 4 and item["answer"] in range(4) for item in items)
    assert {sum(item["answer"] == place for item in items) for place in range(4)} == {12}
