"""`cherry convert-hf`: what it writes and refuses, and Llama models from elsewhere."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cherry_megatron.cli import main
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.storage.lineage import chain, read_lineage
from tests.conftest import run_ranks
from tests.surgery.conftest import model_tensors, save
from tests.surgery.test_expand import _logits


@pytest.fixture
def run(tmp_path, config, data) -> Path:
    """A run of four dense layers, with evaluations and a tokenizer; its configuration lies beside its folder."""
    folder = tmp_path / "trained"
    save(folder / "checkpoints", model_tensors(4), tokenizer_model=str(data / "tokenizer"))
    lines = [{"iteration": 3, "losses": {"1": 9.0}}, {"iteration": 7, "losses": {"1": 5.4321}}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config(
        recurrence={"pattern": "(*-)x4"}, megatron={"seq-length": 64, "tokenizer-model": str(data / "tokenizer")}
    )
    return folder


def convert(load: Path, save: Path, *more: str, config: Path | None = None) -> int:
    told = () if config is None else ("--config", str(config))
    return main(["convert-hf", "--load", str(load), "--save", str(save), "--workers", "1", *told, *more])


def test_a_folder_has_all_that_is_needed(run, tmp_path, data, capsys):
    assert convert(run, tmp_path / "hf", config=tmp_path / "config.yaml") == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert isinstance(model, LlamaForCausalLM)
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (data / "tokenizer", tmp_path / "hf"))
    text = "나는 학교에 갑니다"
    assert ours(text).input_ids == theirs(text).input_ids and ours.chat_template == theirs.chat_template
    assert model.generation_config.eos_token_id == ours.eos_token_id == model.config.eos_token_id
    card = (tmp_path / "hf/README.md").read_text()
    count = sum(p.numel() for p in model.parameters())
    for said in (f"{count:,}, float32", "| 1 | 5.4321 |", "at step 7", "no record", 'from_pretrained("hf")'):
        assert said in card, said
    # Both ways the chain goes on, and the files are what the record says.
    assert convert(tmp_path / "hf", tmp_path / "back") == 0
    lines = describe(tmp_path / "back", verify=True)
    assert [re.split(r"\s+", line.strip())[1] for line in lines] == ["import-hf", "export-hf", "unknown"]
    assert "verified" in lines[0] and "there, same manifest" in lines[1]
    assert "verified" in describe(tmp_path / "hf", verify=True)[0]
    record = read_lineage(tmp_path / "back/iter_0000000")
    assert len({entry["tokenizer"] for _, entry in chain(record) if "tokenizer" in entry}) == 1
    written = yaml.safe_load((tmp_path / "back/config.yaml").read_text())["megatron"]
    assert written["tokenizer-model"] == str(tmp_path / "back/tokenizer")
    assert AutoTokenizer.from_pretrained(written["tokenizer-model"])(text).input_ids == ours(text).input_ids


def test_a_card_tells_the_lineage_without_paths(run, tmp_path):
    assert convert(run, tmp_path / "hf", config=tmp_path / "config.yaml") == 0
    assert convert(tmp_path / "hf", tmp_path / "back") == 0
    assert convert(tmp_path / "back", tmp_path / "again", config=tmp_path / "back/config.yaml") == 0
    card = (tmp_path / "again/README.md").read_text()
    assert "import-hf" in card and "export-hf" in card
    assert str(tmp_path) not in card
    assert "No evaluation of this checkpoint is recorded." in card
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again")]
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[0][n], both[1][n]) for n in both[0])


def test_a_dry_run_writes_nothing(run, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert convert(run, tmp_path / "hf", "--dry-run", config=tmp_path / "config.yaml") == 0
    assert "writes " in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_that_is_taken_is_refused_without_a_plan(run, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine").touch()
    assert convert(run, tmp_path / "hf", config=tmp_path / "config.yaml") == 2
    said = capsys.readouterr()
    assert "hf exists and is not empty; choose another folder" in said.err and not said.out


def test_a_source_that_does_not_exist_is_said_to(tmp_path, capsys):
    assert convert(tmp_path / "none", tmp_path / "hf") == 2
    assert f"{tmp_path}/none does not exist; correct the path" in capsys.readouterr().err


def test_damaged_tensors_are_not_converted(run, tmp_path, capsys):
    """Whatever is damaged by its manifest ends the conversion, and nothing is left."""
    assert convert(run, tmp_path / "hf", config=tmp_path / "config.yaml") == 0
    path = tmp_path / "hf/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    before = sorted(tmp_path.iterdir())
    assert convert(tmp_path / "hf", tmp_path / "back") == 2
    assert "the tensor lm_head.weight is not what was saved (SHA-256)" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


OUT = {
    "window": (("--set", "megatron.window-size=[8,0]"), "megatron.window-size is [8, 0]"),
    "layers": (("--set", "recurrence.pattern=(*-)x3"), "holds 4 layers, recurrence.pattern 3"),
    "mixture": (("--set", "moee.experts=2"), "moee.experts is 2, but"),
    "length": (("--set", "megatron.seq-length=null"), "set megatron.seq-length to a positive number"),
    "tokenizer": (("--set", "megatron.tokenizer-model=null"), "set megatron.tokenizer-model to the tokenizer's"),
    "no-tokenizer": (("--set", "megatron.tokenizer-model=nowhere"), "cannot read nowhere/tokenizer.json"),
    "shard": (("--shard-size", "0"), "--shard-size 0.0 must be a positive number of gigabytes"),
    "shard-nan": (("--shard-size", "nan"), "--shard-size nan must be a positive number of gigabytes"),
    "shard-inf": (("--shard-size", "inf"), "--shard-size inf must be a positive number of gigabytes"),
    "workers": (("--workers", "-1"), "--workers -1 is negative"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_what_cannot_go_out_is_refused(name, run, tmp_path, capsys):
    more, says = OUT[name]
    before = sorted(tmp_path.iterdir())
    assert convert(run, tmp_path / "hf", *more, config=tmp_path / "config.yaml") == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_of_another_training_is_refused(run, tmp_path, data, capsys):
    shutil.copytree(data / "tokenizer", tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    path.write_text(path.read_text() + " ")
    told = ("--set", f"megatron.tokenizer-model={tmp_path / 'other'}")
    assert convert(run, tmp_path / "hf", *told, config=tmp_path / "config.yaml") == 2
    assert "was trained with" in capsys.readouterr().err
    assert convert(run, tmp_path / "hf") == 2
    assert "has no config.json; to convert a run name its --config" in capsys.readouterr().err


def llama(folder: Path, **more: Any) -> LlamaForCausalLM:
    """A model with random weights, made with transformers, in a folder."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 3e-6,
        "initializer_range": 0.2, "rope_theta": 5000.0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.mul_(torch.rand_like(weight) + 0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_llama_model_gives_its_logits_and_is_compressed(tied, tmp_path, write_config):
    """Through Megatron, which loads what was imported with the configuration that was written."""
    model = llama(tmp_path / "llama", tie_word_embeddings=tied, head_dim=16 if tied else None)
    assert convert(tmp_path / "llama", tmp_path / "ours") == 0
    sections = yaml.safe_load((tmp_path / "ours/config.yaml").read_text())
    recurrence = {**sections["recurrence"], "loop_scales": False}
    dense = write_config(tmp_path / "dense", recurrence=recurrence, megatron=sections["megatron"])
    (found,) = run_ranks(tmp_path / "out", 1, _logits, dense)
    tokens = torch.arange(64).view(2, 32) * 7 % 500
    with torch.no_grad():
        wanted = model(tokens).logits
    assert wanted.abs().max() > 1
    assert (torch.tensor(found) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    # What is made of it is the mean of its layers.
    small = write_config(
        tmp_path / "small", recurrence={"pattern": "*-[*-]x4*-", "loop_scales": False},
        megatron={**sections["megatron"], "load": None, "finetune": None},
    )  # fmt: skip
    command = [
        "compress-depth",
        "--load",
        str(tmp_path / "ours"),
        "--save",
        str(tmp_path / "six"),
        "--workers",
        "1",
    ]
    assert main([*command, "--config", str(small)]) == 0
    merged = open_checkpoint(tmp_path / "six").read("decoder.layers.2.self_attention.linear_proj.weight")
    layers = [model.model.layers[k].self_attn.o_proj.weight for k in (2, 3)]
    torch.testing.assert_close(torch.tensor(merged), sum(layers).detach() / 2)
    # And goes out again, to what it was.
    assert (
        convert(tmp_path / "ours", tmp_path / "again", "--no-tokenizer", config=tmp_path / "ours/config.yaml") == 0
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("llama", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def _change(**keys: Any):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def _weights(function):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")

    return change


Q = "model.layers.1.self_attn.q_proj.weight"
IN = {
    "architecture": (_change(model_type="gemma2"), "model_type is 'gemma2'"),
    "rope": (_change(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "rope_parameters is"),
    "rope-4": (_change(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is {'type': 'linear'"),
    "part": (_change(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "theta": (_change(rope_parameters=None, rope_theta=10000.5), "rope_theta is 10000.5; Megatron takes a whole"),
    "bias": (_change(attention_bias=True), "attention_bias is True: layers here have False"),
    "mlp-bias": (_change(mlp_bias=True), "mlp_bias is True"),
    "activation": (_change(hidden_act="gelu"), "hidden_act is 'gelu': layers here have 'silu'"),
    "quantized": (_change(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    "no-number": (_change(num_hidden_layers="6"), "num_hidden_layers is '6', not a whole number"),
    "groups": (_change(num_key_value_heads=3), "config.json: num-attention-heads 4 is not a multiple"),
    "fewer": (_change(num_hidden_layers=5), "model.layers.5.input_layernorm.weight is not one of a model"),
    "more": (_change(num_hidden_layers=7), "the tensor model.layers.6.input_layernorm.weight is missing"),
    "shape": (_change(intermediate_size=66), "mlp.gate_proj.weight is [64, 32], by config.json [66, 32]"),
    "heads": (_change(head_dim=4), "self_attn.q_proj.weight is [32, 32], by config.json [16, 32]"),
    "tied": (_change(tie_word_embeddings=True), "lm_head.weight is not model.embed_tokens.weight, but tie_word"),
    "missing": (_weights(lambda tensors: tensors.pop(Q)), f"the tensor {Q} is missing"),
    "unknown": (_weights(lambda tensors: tensors.update(odd=torch.ones(2))), "odd is not one of a model"),
    "type": (_weights(lambda tensors: tensors.update({Q: tensors[Q].half()})), f"{Q} is float16, but"),
    "no-json": (lambda folder: (folder / "config.json").write_text("{"), "cannot read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def from_elsewhere(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "llama"
    llama(folder)
    return folder


@pytest.mark.parametrize("name", IN)
def test_what_cannot_come_in_is_refused(name, from_elsewhere, tmp_path, capsys):
    change, says = IN[name]
    shutil.copytree(from_elsewhere, tmp_path / "llama")
    change(tmp_path / "llama")
    assert convert(tmp_path / "llama", tmp_path / "ours") == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


HELD = {
    "eps": ("megatron.norm-epsilon=1e-5", "megatron.norm-epsilon is 1e-05, but"),
    "theta": ("megatron.rotary-base=10000", "megatron.rotary-base is 10000, but"),
    "heads": ("megatron.num-attention-heads=8", "8 heads and 2 query groups of 4 do not make the 64 rows"),
    "layers": ("recurrence.pattern=(*-)x5", "holds 6 layers, recurrence.pattern 5"),
    "tied": ("megatron.untie-embeddings-and-output-weights=false", "untie-embeddings-and-output-weights is False"),
    "depths": ("mtp.depths=1", "mtp.depths is 1, but"),
    "vocabulary": ("megatron.padded-vocab-size=500", "megatron.padded-vocab-size is 500, but"),
    "mixture": ("moee.experts=2", "moee.experts is 2, but"),
    "loops": ("recurrence.pattern=*-[(*-)x4]x3*-", "recurrence.loops is 3, but"),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_a_configuration_is_held_against_the_model(name, from_elsewhere, tmp_path, capsys):
    override, says = HELD[name]
    assert convert(from_elsewhere, tmp_path / "ours") == 0
    config = tmp_path / "ours/config.yaml"
    assert convert(from_elsewhere, tmp_path / "held", "--set", override, config=config) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
    assert not (tmp_path / "held").exists()


def test_a_vocabulary_is_padded_as_the_configuration_says(from_elsewhere, tmp_path, capsys):
    assert convert(from_elsewhere, tmp_path / "ours") == 0
    padded = ("--set", "megatron.padded-vocab-size=640")
    assert convert(from_elsewhere, tmp_path / "padded", *padded, config=tmp_path / "ours/config.yaml") == 0
    assert "512 words, and 128 of zeros" in capsys.readouterr().out
    before, after = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "padded")
    for name in before.tensors:
        ours, theirs = before.read(name), after.read(name)
        assert (theirs[: len(ours)] == ours).all() and not theirs[len(ours) :].any()
        assert (len(theirs) > len(ours)) == (name in ("embedding.word_embeddings.weight", "output_layer.weight"))


def test_flags_of_one_way_are_refused_on_the_other(from_elsewhere, tmp_path, capsys):
    for flags, says in (
        (("--shard-size", "1"), "--shard-size is of the way out"),
        (("--no-tokenizer",), "--no-tokenizer is of the way out"),
        (("--set", "mtp.depths=1"), "--set overrides keys of --config"),
    ):
        assert convert(from_elsewhere, tmp_path / "ours", *flags) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
