"""A mixture is its experts to the bit, computes what they do, and refuses what does not fit."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from cherry_megatron.cli import main
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.checkpoint import open_checkpoint
from tests.surgery.conftest import model_tensors, save


@pytest.fixture
def mixture(tmp_path, config) -> Path:
    """Two models of 4 layers, and a configuration that makes them one mixture; returns their folder."""
    for number in range(2):
        save(tmp_path / f"run{number}", model_tensors(4, seed=number))
    content = yaml.safe_load(config(recurrence={"pattern": "*-[*-*-]x4*-"}).read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, "moee": {"experts": 2, "router_hidden": 6}}))
    return tmp_path


def command(folder: Path, *loads: str, save: str = "mixture", more: tuple[str, ...] = ()) -> list[str]:
    found = ["assemble-moee", "--load", *(str(folder / load) for load in loads), "--save", str(folder / save)]
    return [*found, "--config", str(folder / "config.yaml"), "--workers", "2", *more]


def test_an_extracted_expert_is_the_model_that_was_assembled(mixture, capsys):
    assert main(command(mixture, "run0", "run1")) == 0
    for number in range(2):
        assert main(command(mixture, "mixture", save=f"back{number}", more=("--extract", str(number)))) == 0
        before, after = (open_checkpoint(mixture / f"{name}{number}") for name in ("run", "back"))
        assert before.model.keys() == after.tensors.keys()
        for name in before.model:
            assert before.read(name).tobytes() == after.read(name).tobytes(), name
    lines = describe(mixture / "mixture", verify=True)
    assert "assemble-moee" in lines[0]
    assert ["experts.0" in lines[1], "experts.1" in lines[2]] == [True, True]


def test_the_router_is_drawn_like_one_in_training(mixture):
    """Its spread, not its values; another seed gives others."""
    drawn = []
    for seed in ("0", "1"):
        assert main(command(mixture, "run0", "run1", save=f"seed{seed}", more=("--seed", seed))) == 0
        found = open_checkpoint(mixture / f"seed{seed}")
        drawn.append({name: found.read(f"router.{name}") for name in ("embedding", "inner", "outer", "centre")})
    spread = {"embedding": 1.0, "inner": 12**-0.5, "outer": 0.1 * 6**-0.5}
    for name, shape in {"embedding": (40, 6), "inner": (6, 12), "outer": (2, 6)}.items():
        values = np.stack([one[name] for one in drawn])
        assert values.shape == (2, *shape)
        assert 0.6 < values.std() / spread[name] < 1.4
        assert not np.array_equal(*values)
    assert all(np.array_equal(one["centre"], [0, 0]) for one in drawn)


def _other_tokenizer(folder: Path) -> None:
    for number in range(2):
        (folder / f"run{number}" / "tokenizer").mkdir()
        (folder / f"run{number}" / "tokenizer" / "tokenizer.json").write_text(str(number))
        tokenizer = str(folder / f"run{number}" / "tokenizer")
        save(folder / f"run{number}", model_tensors(4), tokenizer_model=tokenizer)


def _other_type(folder: Path) -> None:
    save(folder / "run1", model_tensors(4, dtype="bfloat16"))


def _fewer_layers(folder: Path) -> None:
    save(folder / "run1", model_tensors(3))


def _cut(folder: Path) -> None:
    largest = max((folder / "run1/iter_0000007").glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-900])


REFUSED = {
    "one-run": (None, ("run0",), (), "--load names 1 checkpoints, but"),
    "no-mixture": (None, ("run0", "run1"), ("--set", "moee=null"), "has no section moee"),
    "tokenizer": (_other_tokenizer, ("run0", "run1"), (), "experts predict the same tokens"),
    "type": (_other_type, ("run0", "run1"), (), "embedding.word_embeddings.weight is bfloat16"),
    "layers": (_fewer_layers, ("run0", "run1"), (), "holds 3 layers, recurrence.pattern 4"),
    "loops": (None, ("run0", "run1"), ("--set", "recurrence.loop_scales=true"), "has a layer without"),
    "hidden": (None, ("run0", "run1"), ("--set", "megatron.hidden-size=25"), "megatron.hidden-size is 25"),
    "function": (None, ("run0", "run1"), ("--set", "megatron.rotary-base=500"), "was trained with 10000"),
    "damaged": (_cut, ("run0", "run1"), (), "is truncated"),
    "nothing": (None, ("run0", "none"), (), "no checkpoint there"),
    "seed": (None, ("run0", "run1"), ("--seed", "-1"), "--seed -1 is negative"),
    "workers": (None, ("run0", "run1"), ("--workers", "-1"), "--workers -1 is negative"),
    "extract-two": (None, ("run0", "run1"), ("--extract", "0"), "--extract takes one mixture"),
    "extract-of-a-model": (None, ("run0",), ("--extract", "0"), "holds no expert 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, mixture, capsys):
    prepare, loads, more, says = REFUSED[name]
    if prepare is not None:
        prepare(mixture)
    before = sorted(path.name for path in mixture.iterdir())
    assert main(command(mixture, *loads, more=more)) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
    assert sorted(path.name for path in mixture.iterdir()) == before


def test_mixtures_are_not_assembled(mixture, capsys):
    assert main(command(mixture, "run0", "run1")) == 0
    assert main(command(mixture, "mixture", "run1", save="second")) == 2
    assert "is a mixture; name single models" in capsys.readouterr().err
