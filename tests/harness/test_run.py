"""`cherry evaluate --tasks`: scores computed by hand, the same of Hugging Face's form and under any layout."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from cherry_megatron.storage.ancestry import hash_all
from cherry_megatron.storage.lineage import MANIFEST, manifest_text
from cherry_megatron.storage.weights import WHOLE, Weights
from tests.conftest import TINY, run_ranks
from tests.harness.conftest import LOOPS, TASKS, samples
from tests.harness.llama import save_as_llama, walk
from tests.inference.test_generate import with_model
from tests.model import reference

HEADS = TINY["num-attention-heads"]


def _weights(_prompts, model):
    return {name: tensor.numpy() for name, tensor in model[0].state_dict().items() if torch.is_tensor(tensor)}


@pytest.fixture(scope="module")
def weights(asked, tmp_path_factory):
    (found,) = run_ranks(tmp_path_factory.mktemp("weights"), 1, with_model, asked, "", _weights)
    return {name: torch.from_numpy(array) for name, array in found.items()}


@pytest.fixture(scope="module")
def by_hand(weights, data):
    """The tokenizer, and log-probabilities after each token of a text, [s, v], of plain PyTorch."""
    tokenizer = Tokenizer.from_file(str(data / "tokenizer/tokenizer.json"))

    def likely(tokens: list[int], loops: int = LOOPS) -> torch.Tensor:
        shape = {"heads": HEADS, "groups": HEADS, "size": TINY["hidden-size"] // HEADS}
        return reference.forward(weights, torch.tensor([tokens]), walk(loops), **shape)[0].double().log_softmax(-1)

    return tokenizer, likely


def questions() -> list[dict]:
    return [json.loads(line) for line in (TASKS / "cherry_ko.jsonl").read_text().splitlines()]


def choice_likelihoods(by_hand, loops=LOOPS) -> list[list[float]]:
    """log p of each answer of each question."""
    tokenizer, likely = by_hand
    found = []
    for item in questions():
        context = tokenizer.encode(f"질문: {item['question']}\n답:").ids
        totals = []
        for choice in item["choices"]:
            whole = tokenizer.encode(f"질문: {item['question']}\n답: {choice}").ids
            assert whole[: len(context)] == context
            said = torch.tensor(whole[len(context) :])
            totals.append(float(likely(whole[:-1], loops)[len(context) - 1 :].gather(1, said[:, None]).sum()))
        found.append(totals)
    return found


def share_right(answers: list[int]) -> float:
    return sum(a == item["answer"] for a, item in zip(answers, questions(), strict=True)) / len(answers)


def scores(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["results"]


def test_multiple_choice_is_what_is_computed_by_hand(evaluated, by_hand):
    folder, said = evaluated
    wanted = choice_likelihoods(by_hand)
    found = samples(folder, "cherry_ko")
    for totals, item in zip(wanted, found, strict=True):
        assert [total for total, _ in item["answers"]] == pytest.approx(totals, rel=1e-5)
    likeliest = [totals.index(max(totals)) for totals in wanted]
    by_length = [
        max(range(4), key=lambda n, t=totals, c=item["choices"]: t[n] / len(c[n]))
        for totals, item in zip(wanted, questions(), strict=True)
    ]
    assert len({*likeliest}) == 4, "a model that always says one place is no test"
    assert scores(folder)["cherry_ko"]["acc,none"] == share_right(likeliest)
    assert scores(folder)["cherry_ko"]["acc_norm,none"] == share_right(by_length)
    assert f"{share_right(likeliest):.4f}" in said
    assert str(folder) in said


def test_perplexity_of_texts_is_what_is_computed_by_hand(evaluated, by_hand):
    folder, _ = evaluated
    tokenizer, likely = by_hand
    total = size = 0
    for item in questions():
        text = f"{item['question']} {item['choices'][item['answer']]}"
        tokens = tokenizer.encode(text).ids
        read = [tokenizer.token_to_id("<|endoftext|>"), *tokens[:-1]]
        total += float(likely(read).gather(1, torch.tensor(tokens)[:, None]).sum())
        size += len(text.encode())
    found = scores(folder)["cherry_ko_text"]
    assert found["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


def test_free_answers_are_the_likeliest_tokens_up_to_the_line_end(evaluated, by_hand):
    folder, _ = evaluated
    tokenizer, likely = by_hand
    for item in samples(folder, "cherry_ko_speak")[:8]:
        tokens = tokenizer.encode(item["prompt"]).ids
        given = len(tokens)
        for _ in range(16):
            tokens.append(int(likely(tokens)[-1].argmax()))
        wanted = tokenizer.decode(tokens[given:], skip_special_tokens=False)
        wanted = wanted.split("\n")[0].split("<|endoftext|>")[0]
        assert item["answers"] == [wanted.removeprefix(" ")]


@pytest.fixture(scope="module")
def llama(weights, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_as_llama(weights, LOOPS, HEADS, data / "tokenizer", folder)
    return folder


def test_hugging_faces_form_gets_the_same_scores_from_the_harness_own_model(evaluated, llama, cherry, tmp_path):
    ours, _ = evaluated
    names = "cherry_ko,cherry_ko_speak,cherry_ko_text"
    status, said = cherry(tmp_path, "evaluate", "--hf", llama, "--tasks", names, "--task-dir", TASKS)
    assert status == 0, said
    (theirs,) = (llama / "tasks").iterdir()
    _same(ours, theirs)


def test_weights_that_are_not_there_are_not_drawn(llama, cherry, tmp_path):
    """transformers would fill them at random, and the scores would be of nothing."""
    folder = tmp_path / "cut"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("tasks"))
    settings = json.loads((folder / "config.json").read_text())
    settings["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(settings))
    status, said = cherry(tmp_path, "evaluate", "--hf", folder, "--tasks", "cherry_ko", "--task-dir", TASKS)
    assert status == 2 and "the model of its config.json lacks model.layers." in said
    assert not (folder / "tasks").exists()


def test_weights_that_are_not_those_of_their_manifest_are_not_asked(llama, cherry, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("tasks"))
    source = Weights(folder)
    (folder / MANIFEST).write_text(manifest_text(hash_all(source, source.tensors)))
    values = bytearray((folder / WHOLE).read_bytes())
    values[-1] ^= 1
    (folder / WHOLE).write_bytes(values)
    status, said = cherry(tmp_path, "evaluate", "--hf", folder, "--tasks", "cherry_ko", "--task-dir", TASKS)
    assert status == 2 and "is not what was saved (SHA-256); restore the checkpoint" in said
    assert not (folder / "tasks").exists()


def _same(ours: Path, theirs: Path) -> None:
    """Two evaluations of the same weights."""
    found, wanted = scores(ours), scores(theirs)
    assert found.keys() == wanted.keys()
    for task, of_task in found.items():
        for metric, value in of_task.items():
            counted = task != "cherry_ko_text" or isinstance(value, str)  # items, not likelihoods
            assert value == (wanted[task][metric] if counted else pytest.approx(wanted[task][metric], rel=1e-4))
        _same_answers(task, samples(ours, task), samples(theirs, task))


def _same_answers(task: str, ours: list[dict], theirs: list[dict]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one["prompt"] == other["prompt"]
        if task == "cherry_ko":
            totals = [[total for total, _ in item["answers"]] for item in (one, other)]
            assert totals[0] == pytest.approx(totals[1], rel=1e-5)
            assert [greedy for _, greedy in one["answers"]] == [greedy for _, greedy in other["answers"]]
        elif task == "cherry_ko_speak":
            assert one["answers"] == other["answers"]


def test_examples_and_long_prompts_are_cut_as_hugging_faces_form_has_them(asked, llama, cherry, tmp_path):
    question = ("--tasks", "cherry_ko", "--task-dir", TASKS, "--fewshot", 8, "--limit", 5)
    home = tmp_path / "run"
    load = asked.parent / "run"
    more = ("--set", f"run={home}", "--set", f"megatron.load={load}", "--set", "megatron.finetune=true")
    assert cherry(tmp_path / "a", "evaluate", "--config", asked, *question, *more)[0] == 0
    there = {*(llama / "tasks").iterdir()} if (llama / "tasks").exists() else set()
    assert cherry(tmp_path / "b", "evaluate", "--hf", llama, *question)[0] == 0
    (ours,), (theirs,) = (home / "tasks").iterdir(), {*(llama / "tasks").iterdir()} - there
    assert json.loads((ours / "results.json").read_text())["model"]["cut"] > 0, "prompts that fit are no test"
    _same(ours, theirs)


def test_converted_checkpoint_gets_the_same_scores(evaluated, asked, cherry, tmp_path):
    from cherry_megatron.cli import _verbs

    if "convert-hf" not in _verbs():
        pytest.skip("there is no cherry convert-hf yet")
    converted = tmp_path / "hf"
    command = ("convert-hf", "--config", asked, "--load", asked.parent / "run", "--save", converted)
    assert cherry(tmp_path / "convert", *command)[0] == 0
    names = "cherry_ko,cherry_ko_speak,cherry_ko_text"
    status, said = cherry(tmp_path / "ask", "evaluate", "--hf", converted, "--tasks", names, "--task-dir", TASKS)
    assert status == 0, said
    _same(evaluated[0], next((converted / "tasks").iterdir()))


LAYOUTS = {
    "dp2": (2, []),
    "tp2-sp-dp2": (4, ["--tensor-model-parallel-size", 2, "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", 2]),
}


@pytest.mark.parametrize(
    "name", [name if name == "dp2" else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_other_loops_and_layouts(name, asked, evaluated, by_hand, cherry, tmp_path):
    """One folder for each number of loops; ranks give what one process does."""
    world, flags = LAYOUTS[name]
    home, load = tmp_path / "run", asked.parent / "run"
    more = ("--set", f"run={home}", "--set", f"megatron.load={load}", "--set", "megatron.finetune=true")
    names = ("--tasks", "cherry_ko,cherry_ko_speak", "--task-dir", TASKS, "--limit", 7, "--loops", 3, 1)
    status, said = cherry(tmp_path, "evaluate", "--config", asked, *names, *more, "--", *flags, world=world)
    assert status == 0, said
    one, three = sorted((home / "tasks").iterdir(), key=lambda folder: folder.name[-1])
    for task in ("cherry_ko", "cherry_ko_speak"):
        found = samples(three, task)
        assert len(found) == 7
        _same_answers(task, found, samples(evaluated[0], task)[:7])
    totals = [[total for total, _ in item["answers"]] for item in samples(one, "cherry_ko")]
    for found, wanted in zip(totals, choice_likelihoods(by_hand, loops=1), strict=False):
        assert found == pytest.approx(wanted, rel=1e-5)


def _asked_by_name(config: Path) -> dict:
    """The harness' own entry, with the model by the name under which it is registered."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import cherry_megatron.harness.model  # noqa: F401
    from cherry_megatron.platform.machine import prepare

    prepare()
    from cherry_megatron.harness.tasks import LocalTasks

    manager: TaskManager = LocalTasks(TASKS, [], config.parent / "cache")
    found = lm_eval.simple_evaluate(
        model="cherry",
        model_args={"config": str(config), "loops": 1},
        tasks=["cherry_ko"],
        task_manager=manager,
        limit=4,
    )
    return found["results"]["cherry_ko"]


def test_the_harness_knows_the_model_by_its_name(asked, by_hand, tmp_path):
    (found,) = run_ranks(tmp_path, 1, _asked_by_name, asked)
    wanted = [totals.index(max(totals)) for totals in choice_likelihoods(by_hand, loops=1)[:4]]
    right = [item["answer"] for item in questions()[:4]]
    assert found["acc,none"] == sum(a == b for a, b in zip(wanted, right, strict=True)) / 4
