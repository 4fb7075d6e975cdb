"""Models become experts inside layers: FFNs to the bit, all else the exact mean of what corresponds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cherry_megatron.cli import main
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.checkpoint import open_checkpoint
from tests.surgery.conftest import FFN, GROUPS, HEADS, HIDDEN, SIZE, model_tensors, save

PATTERN = "*-[*E*-]x4*E"
EXPERTS = (3, 7)  # sublayers
OTHERS = (1, 5)


def record(folder: Path, identity: str, *parents: dict[str, Any], **details: Any) -> None:
    """What training has written beside a checkpoint."""
    content = {"operation": "pretrain", "identity": identity, "parents": list(parents), **details}
    (folder / "iter_0000007" / "lineage.json").write_text(json.dumps(content))


COMMON = {"operation": "compress-depth", "identity": "common", "path": "/none", "parents": []}


def order(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a model's neurons, query groups, and heads of a group come from in the first one's order."""
    draw = np.random.default_rng(number)
    if not number:
        return np.arange(FFN), np.arange(GROUPS), np.arange(HEADS // GROUPS)
    return draw.permutation(FFN), draw.permutation(GROUPS), draw.permutation(HEADS // GROUPS)


def reordered(tensors: dict[str, Any], number: int) -> dict[str, Any]:
    """The same model with its neurons and heads in another order."""
    neurons, groups, heads = order(number)
    found = dict(tensors)
    for name, values in tensors.items():
        if name.endswith("fc1.weight"):
            found[name] = values.view(2, FFN, HIDDEN)[:, neurons].reshape(2 * FFN, HIDDEN)
        elif name.endswith("fc2.weight"):
            found[name] = values[:, neurons]
        elif name.endswith("qkv.weight"):
            units = values.view(GROUPS, HEADS // GROUPS + 2, SIZE, HIDDEN)[groups]
            inner = [*heads, HEADS // GROUPS, HEADS // GROUPS + 1]
            found[name] = units[:, inner].reshape(-1, HIDDEN)
        elif name.endswith("proj.weight"):
            found[name] = values.view(HIDDEN, GROUPS, HEADS // GROUPS, SIZE)[:, groups][:, :, heads].reshape(
                HIDDEN, -1
            )
    return {name: values.contiguous() for name, values in found.items()}


def branches(folder: Path, count: int = 3, dtype: str = "float32") -> list[dict[str, Any]]:
    """Models that have grown apart a little from one, each in an order of its own; returns them in the first's."""
    import torch

    whole = model_tensors(4)
    grown = []
    for number in range(count):
        draw = torch.Generator().manual_seed(50 + number)
        one = {
            n: (v + torch.randn(v.shape, generator=draw) / 50).to(getattr(torch, dtype)) for n, v in whole.items()
        }
        grown.append(one)
        save(folder / f"run{number}", reordered(one, number))
        record(folder / f"run{number}", f"run{number}", COMMON)
    return grown


@pytest.fixture
def configuration(tmp_path, config) -> Path:
    """A configuration of three experts; returns its folder."""
    path = config(recurrence={"pattern": PATTERN}, megatron={"num-experts": 3})
    assert path.parent == tmp_path
    return tmp_path


def command(folder: Path, *loads: str, save: str = "made", more: tuple[str, ...] = ()) -> list[str]:
    found = ["assemble-moee", "--load", *(str(folder / load) for load in loads), "--save", str(folder / save)]
    return [*found, "--config", str(folder / "config.yaml"), "--workers", "2", *more]


RUNS = ("run0", "run1", "run2")


def bits(values: Any) -> bytes:
    """Of a torch tensor."""
    import torch

    return values.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_copied_and_all_else_is_the_exact_mean(dtype, configuration, capsys):
    import torch

    grown = branches(configuration, dtype=dtype)
    assert main(command(configuration, *RUNS)) == 0
    made = open_checkpoint(configuration / "made")
    read = {name: made.read(name) for name in made.model}
    for sublayer in EXPERTS:
        prefix = f"decoder.layers.{sublayer}."
        for linear in ("linear_fc1", "linear_fc2"):
            stacked = read.pop(f"{prefix}mlp.experts.experts.{linear}.weight")
            for number in range(3):
                own = open_checkpoint(configuration / f"run{number}").read(f"{prefix}mlp.{linear}.weight")
                assert stacked[number].tobytes() == own.tobytes()
        assert read.pop(f"{prefix}mlp.router.weight").shape == (3, HIDDEN)
        read[f"{prefix}mlp.linear_fc1.layer_norm_weight"] = read.pop(f"{prefix}pre_mlp_layernorm.weight")
    ffns = {f"decoder.layers.{k}.mlp.linear_fc{n}.weight" for k in EXPERTS for n in (1, 2)}
    assert read.keys() == grown[0].keys() - ffns
    for name, values in read.items():
        wanted = torch.stack([one[name].double() for one in grown]).sum(0) / 3
        assert values.tobytes() == bits(wanted.to(getattr(torch, dtype))), name


def test_copies_of_one_model_are_that_model(configuration):
    branches(configuration, 1)
    assert main(command(configuration, "run0", "run0", "run0")) == 0
    made, one = (open_checkpoint(configuration / name) for name in ("made", "run0"))
    for name in one.model.keys() & made.model.keys():
        assert made.read(name).tobytes() == one.read(name).tobytes(), name
    lines = describe(configuration / "made", verify=True)
    assert [f"experts.{number}" in line for number, line in enumerate(lines[1::2])] == [True] * 3


def test_routers_of_loops_begin_alike_and_layers_do_not(configuration):
    branches(configuration)
    made = []
    for seed in ("0", "1"):
        more = ("--set", "recurrence.loop_routers=true", "--seed", seed)
        assert main(command(configuration, *RUNS, save=f"seed{seed}", more=more)) == 0
        found = open_checkpoint(configuration / f"seed{seed}")
        made.append([found.read(f"decoder.layers.{k}.mlp.router.weight") for k in EXPERTS])
    (core, coda), (other, _) = made
    assert core.shape == (4, 3, HIDDEN) and coda.shape == (3, HIDDEN)
    assert all(np.array_equal(loop, core[0]) for loop in core)
    assert not np.array_equal(core[0], coda) and not np.array_equal(core, other)
    assert 0.6 < np.concatenate((core[0], coda, other[0])).std() / 0.02 < 1.4


def test_what_loops_have_is_averaged(configuration):
    import torch

    from cherry_megatron.storage.layers import LOOP_SCALES

    def looped(number: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(number)
        roles = {f"decoder.layers.{k}.{role}" for k in range(2, 6) for role in LOOP_SCALES["-" if k % 2 else "*"]}
        return model_tensors(4) | {name: torch.randn(4 * HIDDEN, generator=draw) for name in sorted(roles)}

    for number in range(3):
        save(configuration / f"run{number}", looped(number))
        record(configuration / f"run{number}", f"run{number}", COMMON)
    assert main(command(configuration, *RUNS, more=("--set", "recurrence.loop_scales=true"))) == 0
    made = open_checkpoint(configuration / "made")
    for name in looped(0):
        if name.endswith("loop_scale"):
            new = name.replace("3.mlp.linear_fc1.layer_norm_loop", "3.pre_mlp_layernorm.loop")
            wanted = torch.stack([looped(number)[name].double() for number in range(3)]).sum(0) / 3
            assert made.read(new).tobytes() == bits(wanted.float()), name


def test_a_dry_run_writes_nothing(configuration, capsys):
    branches(configuration)
    before = sorted(path.name for path in configuration.iterdir())
    assert main(command(configuration, *RUNS, more=("--dry-run",))) == 0
    said = capsys.readouterr().out
    assert "ancestor    common, compress-depth" in said and "layers 'E'  2, of 3 experts each" in said
    assert sorted(path.name for path in configuration.iterdir()) == before


def _strangers(folder: Path) -> None:
    record(folder / "run1", "run1", {**COMMON, "identity": "other"})


def _taught(folder: Path) -> None:
    """By one teacher, which is no ancestor."""
    for number in range(3):
        record(folder / f"run{number}", f"run{number}", {**COMMON, "role": "teacher"})


def _taken_from_one_mixture(folder: Path, *parents: dict[str, Any]) -> None:
    run = {**COMMON, "operation": "pretrain", "parents": list(parents)}
    experts = [{**run, "identity": f"expert{number}", "role": f"experts.{number}"} for number in range(3)]
    mixture = {**COMMON, "operation": "assemble-moee", "identity": "mixture", "parents": experts}
    for number in range(3):
        record(folder / f"run{number}", f"run{number}", mixture, operation="extract-expert", expert=number)


def _expanded_apart(folder: Path) -> None:
    for number in range(3):
        made = {**COMMON, "operation": "expand", "identity": f"expanded{number}", "parents": [COMMON]}
        record(folder / f"run{number}", f"run{number}", made)


def _without_a_record(folder: Path) -> None:
    (folder / "run2" / "iter_0000007" / "lineage.json").unlink()


def _mixture_too(folder: Path) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**content, "moee": {"experts": 3}}))


def _fewer_layers(folder: Path) -> None:
    save(folder / "run1", model_tensors(3))


def _other_type(folder: Path) -> None:
    save(folder / "run1", model_tensors(4, dtype="bfloat16"))


REFUSED = {
    "strangers": (_strangers, (), "run1/iter_0000007 and "),
    "taught-alike": (_taught, (), "have no common ancestor"),
    "of-one-mixture": (_taken_from_one_mixture, (), "have no common ancestor"),
    "expanded-apart": (_expanded_apart, (), "have no common ancestor"),
    "no-record": (_without_a_record, (), "run2/iter_0000007 has no record of what it was made from"),
    "two-kinds": (_mixture_too, (), "moee.experts are whole models, and a layer 'E' has experts too"),
    "number": (None, ("--set", "megatron.num-experts=4"), "--load names 3 checkpoints, but"),
    "corrections": (
        None,
        ("--set", "recurrence.loop_rank=2", "--set", "recurrence.pattern=*E[*-*-]x4*-"),
        "the mean of corrections does not correct the mean",
    ),
    "width": (None, ("--set", "megatron.moe-ffn-hidden-size=8"), "moe-ffn-hidden-size is 8, but"),
    "layers": (_fewer_layers, (), "holds 3 layers, recurrence.pattern 4"),
    "type": (_other_type, (), "embedding.word_embeddings.weight is bfloat16"),
    "prediction": (None, ("--set", "mtp.depths=1"), "mtp.depths is 1, but"),
    "seed": (None, ("--seed", "-1"), "--seed -1 is negative"),
    "extract": (None, ("--extract", "0"), "none can be taken out as a model"),
}


def test_experts_of_a_mixture_may_have_a_common_ancestor(configuration):
    """Their own, and not that of another expert."""
    branches(configuration)
    _taken_from_one_mixture(configuration, COMMON)
    assert main(command(configuration, *RUNS, more=("--dry-run",))) == 0


COMPRESSIONS = {
    "one": ("--method", "random", "--seed", "1"),
    "same": ("--method", "random", "--seed", "1"),
    "other-seed": ("--method", "random", "--seed", "2"),
    "mean": ("--groups", "0-1,2-3,4-5,6-7"),
    "other-groups": ("--groups", "0,1-3,4-6,7"),
}


@pytest.mark.parametrize(
    ("first", "second", "related"),
    [("one", "same", True), ("one", "other-seed", False), ("one", "mean", False), ("mean", "other-groups", False)],
)
def test_compressions_of_one_model_are_strangers(first, second, related, tmp_path, config, capsys):
    """However near their source is; two that are the same model bit for bit are not."""
    save(tmp_path / "deep", model_tensors(8))
    record(tmp_path / "deep", "deep")
    for name in (first, second):
        made = ["--load", str(tmp_path / "deep"), "--save", str(tmp_path / name), "--workers", "1"]
        assert main(["compress-depth", "--config", str(config()), *made, *COMPRESSIONS[name]]) == 0
    config(recurrence={"pattern": PATTERN}, megatron={"num-experts": 2})
    assert main(command(tmp_path, first, second, more=("--dry-run",))) == (0 if related else 2)
    said = capsys.readouterr()
    assert related or "have no common ancestor since their layers were made" in said.err


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, configuration, capsys):
    prepare, more, says = REFUSED[name]
    branches(configuration)
    if prepare is not None:
        prepare(configuration)
    before = sorted(path.name for path in configuration.iterdir())
    assert main(command(configuration, *RUNS, more=more)) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
    assert sorted(path.name for path in configuration.iterdir()) == before


def test_what_was_assembled_is_no_single_model(configuration, capsys):
    branches(configuration)
    assert main(command(configuration, *RUNS)) == 0
    record(configuration / "run0", "run0", COMMON)
    assert main(command(configuration, "made", "run1", "run2", save="again")) == 2
    assert "has experts inside layers" in capsys.readouterr().err
    without = ("--extract", "0", "--set", "recurrence.pattern=*-[*-*-]x4*-", "--set", "megatron.num-experts=null")
    assert main(command(configuration, "made", save="taken", more=without)) == 2
    said = capsys.readouterr().err
    assert "made/iter_0000000 has experts inside layers, which share all else" in said and said.count("\n") == 1
