"""A trained run, its expansion and what transformers loads of both say the same; what comes back trains on."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cherry_megatron.cli import main
from tests.conftest import run_ranks
from tests.inference.test_generate import TOKENS, continued, with_model
from tests.moee.conftest import write_mixture  # noqa: F401

pytestmark = pytest.mark.full
TRAINED = {"seq-length": 96, "max-position-embeddings": 96, "train-iters": 8, "lr": 1e-2, "eval-interval": 8}
KINDS = {
    "recurrent": {"recurrence": {"loop_scales": True, "loop_rank": 2}},
    "experts": {
        "recurrence": {"pattern": "*-[*E]x3*-", "loop_routers": True},
        "megatron": {"num-experts": 4, "moe-router-topk": 2},
    },
    "mixture": {"recurrence": {"injection": "add"}},
    "two-ranks": {"recurrence": {"loop_scales": True, "loop_rank": 2}},
}  # fmt: skip


def greedy(prompts, loops, model):
    return prompts, continued(model, prompts, 0.0, loops=loops).texts


@pytest.fixture(scope="module", params=KINDS)
def trained(request, write_config, write_mixture, train, tmp_path_factory):  # noqa: F811
    folder, kind = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    sections = {**kind, "megatron": {**TRAINED, **kind.get("megatron", {})}}
    if request.param == "mixture":
        path = write_mixture(folder, sections, top_k=1)
    else:
        path = write_config(folder, **sections)
    if request.param == "two-ranks":
        train(path, 2, "--tensor-model-parallel-size 2 --sequence-parallel")
    else:
        train(path)
    return request.param, path


def says(folder, prompts):
    """The likeliest tokens, each text by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    asked = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist() for prompt in prompts]
    return model, texts


def test_texts_are_the_same(trained, write_config, tmp_path):
    kind, path = trained
    loops = 2 if kind == "mixture" else 3
    ((prompts, ours),) = run_ranks(tmp_path / "out", 1, with_model, path, "", greedy, loops)
    run = path.parent / "run"
    assert main(["convert-hf", "--load", str(run), "--save", str(tmp_path / "hf"), "--config", str(path)]) == 0
    assert says(tmp_path / "hf", prompts)[1] == ours
    assert "| loops | loss |" in (tmp_path / "hf/README.md").read_text()
    if kind != "recurrent":
        return
    command = ["compress-depth", "--expand", "--load", str(run), "--save", str(tmp_path / "dense")]
    assert main([*command, "--config", str(path)]) == 0
    dense = write_config(
        tmp_path / "as", recurrence={"pattern": "(*-)x8", "loop_scales": False}, megatron=TRAINED
    )  # fmt: skip
    command = ["convert-hf", "--load", str(tmp_path / "dense"), "--save", str(tmp_path / "llama")]
    assert main([*command, "--config", str(dense)]) == 0
    model, texts = says(tmp_path / "llama", prompts)
    assert isinstance(model, LlamaForCausalLM) and texts == ours


def test_what_comes_back_trains_on(trained, train, tmp_path):
    """From the run itself and from what has been to Hugging Face and back: the same losses, to the bit."""
    _, path = trained
    run = path.parent / "run"
    assert main(["convert-hf", "--load", str(run), "--save", str(tmp_path / "hf"), "--config", str(path)]) == 0
    assert main(["convert-hf", "--load", str(tmp_path / "hf"), "--save", str(tmp_path / "back")]) == 0
    steps = []
    for name, load in (("direct", run), ("around", tmp_path / "back")):
        told = (f"run={tmp_path / name}", f"megatron.load={load}", "megatron.finetune=true")
        steps.append(train(path, flags="--train-iters 4", overrides=told))
    assert len(steps[0]) == 4
    assert [step["loss"] for step in steps[0]] == [step["loss"] for step in steps[1]]
