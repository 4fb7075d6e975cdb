"""A mixture is its experts to the bit, computes what they do, and refuses what does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cherry_megatron.cli import main
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.storage.layers import LINEARS, LOOP_SCALES
from tests.surgery.conftest import HIDDEN, model_tensors, save


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


def _other_tokenizer_of_one_path(folder: Path) -> None:
    """Made anew between the runs, which have recorded what they read."""
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("now")
    for number in range(2):
        save(folder / f"run{number}", model_tensors(4), tokenizer_model=str(folder / "tokenizer"))
        _record(folder, number, tokenizer=str(number))


def _other_tokenizer_of_the_configuration(folder: Path) -> None:
    _other_tokenizer(folder)
    for number in range(2):
        _record(folder, number, tokenizer="0")
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content.setdefault("megatron", {})["tokenizer-model"] = str(folder / "run1/tokenizer")
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def _other_tokenizer_of_the_last(folder: Path) -> None:
    _three(folder)
    for number in (1, 2):
        _record(folder, number, tokenizer=str(number))


def _three(folder: Path) -> None:
    save(folder / "run2", model_tensors(4, seed=2))
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**content, "moee": {"experts": 3}}))


def _record(folder: Path, number: int, **details: object) -> None:
    """What training has written beside a checkpoint."""
    content = {"operation": "pretrain", "identity": f"run{number}", "parents": [], **details}
    (folder / f"run{number}" / "iter_0000007" / "lineage.json").write_text(json.dumps(content))


def _walked(recurrence: dict[str, object]) -> Callable[[Path], None]:
    """The second run has been walked in another way than the configuration says."""

    def prepare(folder: Path) -> None:
        _record(folder, 0, config={"recurrence": {"pattern": "*-[*-*-]x4*-", "loops": 4}})
        _record(folder, 1, config={"recurrence": {"pattern": "*-[*-*-]x4*-", **recurrence}})

    return prepare


def _other_activation(folder: Path) -> None:
    save(folder / "run1", model_tensors(4), squared_relu=True)


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
    "tokenizer-of-one-path": (
        _other_tokenizer_of_one_path,
        ("run0", "run1"),
        (),
        "experts predict the same tokens",
    ),
    "tokenizer-of-the-configuration": (
        _other_tokenizer_of_the_configuration,
        ("run0", "run1"),
        (),
        "run0/iter_0000007 was trained with",
    ),
    "tokenizer-of-the-last": (
        _other_tokenizer_of_the_last,
        ("run0", "run1", "run2"),
        (),
        "run2/iter_0000007 was trained with the tokenizer 2, ",
    ),
    "number-of-loops": (_walked({"loops": 9}), ("run0", "run1"), (), "recurrence.loops is 4, but"),
    "split": (
        _walked({"pattern": "*-*-[*-]x4*-"}),
        ("run0", "run1"),
        (),
        "recurrence.pattern is *-[*-*-]x4*-",
    ),
    "injection": (_walked({"injection": "add"}), ("run0", "run1"), (), "recurrence.injection is none, but"),
    "order": (_walked({"order": "sequence"}), ("run0", "run1"), (), "recurrence.order is cycle, but"),
    "activation": (_other_activation, ("run0", "run1"), (), "megatron.squared-relu is False, but"),
    "type": (_other_type, ("run0", "run1"), (), "embedding.word_embeddings.weight is bfloat16"),
    "layers": (_fewer_layers, ("run0", "run1"), (), "holds 3 layers, recurrence.pattern 4"),
    "loops": (None, ("run0", "run1"), ("--set", "recurrence.loop_scales=true"), "has a layer without"),
    "hidden": (None, ("run0", "run1"), ("--set", "megatron.hidden-size=25"), "megatron.hidden-size is 25"),
    "function": (None, ("run0", "run1"), ("--set", "megatron.rotary-base=500"), "was trained with 10000"),
    "damaged": (_cut, ("run0", "run1"), (), "is truncated"),
    "nothing": (None, ("run0", "none"), (), "none does not exist; correct the path"),
    "seed": (None, ("run0", "run1"), ("--seed", "-1"), "--seed -1 is negative"),
    "workers": (None, ("run0", "run1"), ("--workers", "-1"), "--workers -1 is negative"),
    "extract-two": (None, ("run0", "run1"), ("--extract", "0"), "--extract takes one mixture"),
    "extract-of-a-model": (None, ("run0",), ("--extract", "0"), "is a single model; name a mixture"),
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


def test_no_mixture_is_written_into_a_run(mixture, capsys):
    assert main(command(mixture, "run0", "run1", save="run1/mixture", more=("--dry-run",))) == 2
    said = capsys.readouterr()
    assert f"run1/mixture is inside {mixture}/run1, which is only read" in said.err and not said.out


def test_a_record_that_agrees_is_no_obstacle(mixture):
    """Loops may be written into the pattern or beside it."""
    _walked({"pattern": "*-[*-*-]x2*-", "loops": 4})(mixture)
    assert main(command(mixture, "run0", "run1")) == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--extract", "3"), "holds no expert 3; name one from 0 to 2"),
        (("--extract", "-1"), "holds no expert -1; name one from 0 to 2"),
        (("--extract", "1", "--set", "recurrence.pattern=*-"), "holds 4 layers, recurrence.pattern 1"),
        (("--extract", "1", "--set", "megatron.hidden-size=25"), "megatron.hidden-size is 25"),
        (("--extract", "1", "--set", "recurrence.loops=2"), "recurrence.loops is 2, but"),
    ],
)
def test_an_expert_is_extracted_as_what_it_is(more, says, mixture, capsys):
    """The number of experts is that of the checkpoint, whatever the configuration says."""
    _three(mixture)
    assert main(command(mixture, "run0", "run1", "run2")) == 0
    capsys.readouterr()
    assert main(command(mixture, "mixture", save="taken", more=("--set", "moee.experts=2", *more))) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
    assert not (mixture / "taken").exists()


def _looped_tensors(loops: int, rank: int, seed: int) -> dict[str, Any]:
    """Four layers, the two in the middle with vectors and corrections of each loop."""
    import torch

    tensors, draw = model_tensors(4, seed), torch.Generator().manual_seed(seed)
    for sublayer in range(2, 6):
        start = f"decoder.layers.{sublayer}."
        norm, scale = LOOP_SCALES["-" if sublayer % 2 else "*"]
        for name in (norm, scale):
            tensors[start + name] = torch.randn(loops * HIDDEN, generator=draw)
        for linear in LINEARS["-" if sublayer % 2 else "*"]:
            rows, columns = tensors[f"{start}{linear}.weight"].shape
            tensors[f"{start}{linear}.loop_a"] = torch.randn(loops, rank, columns, generator=draw)
            tensors[f"{start}{linear}.loop_b"] = torch.randn(loops, rows, rank, generator=draw)
    return tensors


def test_what_loops_have_goes_along(mixture, capsys):
    for number in range(2):
        save(mixture / f"run{number}", _looped_tensors(4, 2, number))
    looped = ("--set", "recurrence.loop_scales=true", "--set", "recurrence.loop_rank=2")
    assert main(command(mixture, "run0", "run1", more=looped)) == 0
    made = open_checkpoint(mixture / "mixture")
    for number in range(2):
        run = open_checkpoint(mixture / f"run{number}")
        assert sum("loop" in name for name in run.model) == 24
        for name in run.model:
            assert run.read(name).tobytes() == made.read(f"experts.{number}.{name}").tobytes(), name
    rank = (*looped, "--set", "recurrence.loop_rank=3")
    assert main(command(mixture, "run0", "run1", save="second", more=rank)) == 2
    assert "has rank 2, recurrence.loop_rank is 3" in capsys.readouterr().err


def test_mixtures_are_not_assembled(mixture, capsys):
    assert main(command(mixture, "run0", "run1")) == 0
    assert main(command(mixture, "mixture", "run1", save="second")) == 2
    assert "is a mixture; name single models" in capsys.readouterr().err
