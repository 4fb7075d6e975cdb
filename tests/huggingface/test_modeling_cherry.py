"""What transformers loads says what Megatron does, in one pass and over kept keys and values; and comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cherry_megatron.cli import main
from cherry_megatron.storage.checkpoint import open_checkpoint
from tests.conftest import run_ranks
from tests.huggingface.models import CASES, LENGTH, make, make_mixture, mixture_config, write_config

TOLERANCE = 1e-5
SAMPLE = ("dense", "all", "experts")
EVERY = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.full) for name in CASES]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("made")
    (found,) = run_ranks(folder / "out", 1, make, folder, list(CASES))
    return folder, found


def export(folder: Path, config: Path, *more: str, load: str = "run") -> Path:
    """Convert a model without a tokenizer; returns the folder."""
    target = folder / f"hf{len(list(folder.glob('hf*')))}"
    command = ["convert-hf", "--load", str(folder / load), "--save", str(target), "--config", str(config)]
    assert main([*command, "--no-tokenizer", "--workers", "1", *more]) == 0
    return target


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def in_pieces(model: Any, tokens: torch.Tensor, pieces: tuple[int, ...], **more: Any) -> torch.Tensor:
    """Logits of tokens that are read piece by piece."""
    cache, found, at = None, [], 0
    for count in pieces:
        output = model(tokens[:, at : at + count], cache=cache, use_cache=True, **more)
        cache, at = output.cache, at + count
        found.append(output.logits)
    assert at == tokens.shape[1]
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_ours(name, made):
    folder, found = made
    case, expected = CASES[name], found[name]
    target = export(folder / name, write_config(folder / name, case))
    model, tokens = loaded(target), torch.tensor(expected["tokens"])
    plain = name in ("dense", "dense-tied")
    assert type(model).__name__ == ("LlamaForCausalLM" if plain else "CherryForCausalLM")
    assert plain == (not list(target.glob("*.py")))
    for loops, logits in expected["logits"].items():
        more = {} if plain else {"loops": loops}
        wanted = torch.tensor(logits)
        assert wanted.abs().max() > 0.5
        assert (model(tokens, **more).logits - wanted).abs().max() <= TOLERANCE
        assert (in_pieces(model, tokens, (5, 1, 7, 3), **more) - wanted).abs().max() <= TOLERANCE
        text = model.generate(
            tokens[:, :6],
            attention_mask=torch.ones(2, 6),
            max_new_tokens=LENGTH - 6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **more,
        )
        assert text.tolist() == expected["texts"][loops].tolist()
    for logits, wanted in zip(
        model.predict_ahead(tokens) if expected["ahead"] else [], expected["ahead"], strict=True
    ):
        assert (logits - torch.tensor(wanted)).abs().max() <= TOLERANCE


@torch.no_grad()
def test_without_what_is_predicted_ahead_a_dense_model_is_a_llama(made, capsys):
    folder, found = made
    name = "dense-ahead"
    target = export(folder / name, write_config(folder / name, CASES[name]), "--set", "mtp.depths=0")
    assert "form        LlamaForCausalLM" in capsys.readouterr().out
    wanted = torch.tensor(found[name]["logits"][1])
    assert (loaded(target)(torch.tensor(found[name]["tokens"])).logits - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", EVERY)
def test_what_comes_back_is_what_went_out(name, made, capsys):
    folder, _ = made
    config = write_config(folder / name, CASES[name])
    target = export(folder / name, config, "--shard-size", "2e-5")
    assert len(list(target.glob("*.safetensors"))) > 2
    for number, more in enumerate(((), ("--config", str(config)))):
        back = folder / name / f"back{number}"
        assert main(["convert-hf", "--load", str(target), "--save", str(back), "--workers", "1", *more]) == 0
        before, after = open_checkpoint(folder / name / "run"), open_checkpoint(back)
        assert before.model.keys() == after.tensors.keys()
        for tensor in before.model:
            assert before.tensors[tensor].dtype == after.tensors[tensor].dtype
            assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    # The configuration that is written is of the same model.
    again = export(folder / name, folder / name / "back0" / "config.yaml", load="back0")
    assert (again / "config.json").read_text() == (target / "config.json").read_text()


@pytest.mark.parametrize("name", ["dense-tied", "all"])
def test_what_transformers_saves_comes_in(name, made, tmp_path):
    """As after a training there; and whoever gets it has all of its code."""
    folder, found = made
    target = export(folder / name, write_config(folder / name, CASES[name]))
    model = loaded(target)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    code, saved = ({path.name for path in at.glob("*.py")} for at in (target, tmp_path / "tuned"))
    assert saved == code == (set() if name == "dense-tied" else {"configuration_cherry.py", "modeling_cherry.py"})
    tokens = torch.tensor(found[name]["tokens"])
    with torch.no_grad():
        assert loaded(tmp_path / "tuned")(tokens).logits.equal(model(tokens).logits)
    assert main(["convert-hf", "--load", str(tmp_path / "tuned"), "--save", str(tmp_path / "ours")]) == 0
    before, after = open_checkpoint(folder / name / "run"), open_checkpoint(tmp_path / "ours")
    assert before.model.keys() == after.tensors.keys()
    for tensor in before.model:
        factor = 2 if tensor == "decoder.final_norm.weight" else 1
        assert (factor * before.read(tensor) == after.read(tensor)).all(), tensor


@pytest.fixture(scope="module", params=[2, *(pytest.param(top, marks=pytest.mark.full) for top in (1, 3))])
def mixture(request, tmp_path_factory) -> tuple[Path, Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixture")
    (found,) = run_ranks(folder / "out", 1, make_mixture, folder, request.param, 1)
    return folder, export(folder, mixture_config(folder, request.param, 1)), found


@torch.no_grad()
def test_a_mixture_says_what_ours_does(mixture):
    _, target, expected = mixture
    model, tokens = loaded(target), torch.tensor(expected["tokens"])
    read = tokens[:, :-1]
    output = model(read)
    assert output.cache.chosen.tolist() == expected["chosen"].tolist()
    assert len({*map(tuple, expected["chosen"].tolist())}) > 1 or expected["chosen"].all()
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(6, LENGTH - 1), rtol=1e-5, atol=0)
    losses = -output.logits.gather(-1, tokens[:, 1:, None])[..., 0]
    assert (losses - torch.tensor(expected["losses"])).abs().max() <= TOLERANCE
    # By its own hand: the mean over what is no target of the prefix.
    assert abs(float(model(tokens, labels=tokens).loss - losses[:, 3:].mean())) < 1e-5
    assert (in_pieces(model, read, (5, 1, 6, 3)) - output.logits).abs().max() <= TOLERANCE
    for depth, (likely, wanted) in enumerate(
        zip(model.predict_ahead(read), expected["ahead"], strict=True), start=1
    ):
        found = -likely.gather(-1, tokens[:, depth + 1 :, None])[..., 0]
        assert (found - torch.tensor(wanted)[:, : LENGTH - 1 - depth]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_texts_of_a_mixture_do_not_depend_on_the_others(mixture):
    """Greedy and beams: each alone and padded says what it says in a batch; experts stay those of the prompt."""
    _, target, expected = mixture
    model, tokens = loaded(target), torch.tensor(expected["tokens"])[:, :7]
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones(6, 10, dtype=torch.long)
    mask[:, :3] = 0
    for beams in (3, 1):
        together = model.generate(tokens, attention_mask=mask[:, 3:], num_beams=beams, **asked)
        rows = [{"inputs": row[None], "attention_mask": mask[:1, 3:], "num_beams": beams} for row in tokens]
        alone = [model.generate(**row, **asked)[0].tolist() for row in rows]
        assert together.tolist() == alone
    padded = model.generate(torch.cat((tokens[:, :3] * 0, tokens), 1), attention_mask=mask, **asked)
    assert padded[:, 3:].tolist() == together.tolist()


def test_a_mixture_comes_back(mixture):
    folder, target, _ = mixture
    for name, more in (("back", ()), ("held", ("--config", str(folder / "config.yaml")))):
        assert main(["convert-hf", "--load", str(target), "--save", str(folder / name), *more]) == 0
        before, after = open_checkpoint(folder / "run"), open_checkpoint(folder / name)
        assert before.model.keys() == after.tensors.keys() and len(before.experts) == 3
        for tensor in before.model:
            assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor


@pytest.mark.parametrize("name", SAMPLE[1:])
def test_recomputed_gradients_are_the_gradients(name, made):
    folder, found = made
    model = loaded(export(folder / name, write_config(folder / name, CASES[name]))).train()
    tokens = torch.tensor(found[name]["tokens"])
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(made):
    folder, found = made
    model = loaded(export(folder / "all", write_config(folder / "all", CASES["all"])))
    tokens = torch.tensor(found["all"]["tokens"])
    mask = torch.ones(2, LENGTH + 3, dtype=torch.long)
    mask[:, :3] = 0
    padded = model(torch.cat((tokens[:, :3], tokens), 1), attention_mask=mask).logits[:, 3:]
    assert (padded - model(tokens).logits).abs().max() <= TOLERANCE
    with pytest.raises(ValueError, match="loops is 0"):
        model(tokens, loops=0)
