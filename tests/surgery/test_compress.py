"""Compression: exact means, whatever wrote the source, and nothing read that is not needed."""

from pathlib import Path

import pytest
import torch

from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.surgery import compress
from tests.surgery.conftest import model_tensors, read, save

PARTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
TARGET = 4  # layers of the pattern in conftest.config


def expected(tensors: dict[str, torch.Tensor], groups: list[list[int]], weights: list[float] | None = None):
    """The independent reference: doubles, added in order, divided, rounded once by torch."""
    made = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.layers")}
    for layer, group in enumerate(groups):
        for name in [name for name in tensors if name.startswith(("decoder.layers.0.", "decoder.layers.1."))]:
            sublayer, role = name.removeprefix("decoder.layers.").split(".", 1)
            shares = weights or [1.0] * len(group)
            total = torch.zeros(tensors[name].shape, dtype=torch.float64)
            for member, share in zip(group, shares, strict=True):
                total += tensors[f"decoder.layers.{2 * member + int(sublayer)}.{role}"].double() * share
            made[f"decoder.layers.{2 * layer + int(sublayer)}.{role}"] = (total / sum(shares)).to(
                tensors[name].dtype
            )
    return made


def compressed(load: Path, target: Path, config: Path, **options) -> dict[str, torch.Tensor]:
    compress.plan_compression(load, config, (), compress.Options(**options)).run(target, 2)
    return read(target / "iter_0000000")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("options", "groups", "weights"),
    [
        ({}, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]], None),
        ({"groups": "0-2,3+5,4+6-9/3,10"}, [[0, 1, 2], [3, 5], [4, 6, 9], [10]], None),
        (
            {"groups": "0-1,2-3,4-5,6-7", "method": "weighted", "weights": (0.3, 0.9)},
            [[0, 1], [2, 3], [4, 5], [6, 7]],
            [0.3, 0.9],
        ),
        ({"method": "select"}, [[1], [4], [7], [10]], None),
        ({"groups": "slots"}, [[0, 1], [2, 4, 6, 8], [3, 5, 7, 9], [10]], None),
    ],
)  # fmt: skip
def test_means_are_bit_for_bit_those_of_double_precision(options, groups, weights, tmp_path, config):
    tensors = model_tensors(11)
    save(tmp_path / "deep", tensors)
    assert_same(
        compressed(tmp_path / "deep", tmp_path / "small", config(), **options), expected(tensors, groups, weights)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_stored_type_is_rounded_once(dtype, tmp_path, config):
    tensors = model_tensors(9, dtype=dtype)
    save(tmp_path / "deep", tensors)
    ours = compressed(tmp_path / "deep", tmp_path / "small", config(), groups="0-2,3-5,6-7,8")
    theirs = expected(tensors, [[0, 1, 2], [3, 4, 5], [6, 7], [8]])
    if dtype != "bfloat16":  # torch rounds doubles to bfloat16 twice; test_numbers.py has the exact reference
        assert_same(ours, theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2**-7, atol=0)


def _save_initial(path: Path) -> None:
    """One step that changes no weight, saved."""
    flags = {"train-iters": 1, "lr-decay-iters": 9, "lr": 0, "min-lr": 0}
    status = main(["pretrain", "--config", str(path), "--", *(f"--{key}={value}" for key, value in flags.items())])
    assert not status


LAYOUTS = {
    "tp1": (1, {}),
    "tp2-pp2": (4, {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2}),
    "dp2": (2, {}),
}


def test_the_layout_that_saved_the_source_does_not_matter(tmp_path, write_config):
    from tests.conftest import run_ranks

    small = write_config(tmp_path / "small", recurrence={"pattern": "*-[*-]x3*-", "loop_scales": False})
    found = {}
    for name, (ranks, flags) in LAYOUTS.items():
        deep = write_config(tmp_path / name, recurrence={"pattern": "(*-)x7", "loop_scales": False}, megatron=flags)
        run_ranks(tmp_path / name / "out", ranks, _save_initial, deep)
        found[name] = compressed(tmp_path / name / "run", tmp_path / f"{name}-small", small)
        source = open_checkpoint(tmp_path / name / "run")
        assert source.manifest is not None and max(len(t.chunks) for t in source.tensors.values()) >= ranks / 2
    for name in LAYOUTS:
        assert_same(found[name], found["tp1"])
    initial = read(tmp_path / "tp1/run/checkpoints/iter_0000001")
    model = {name: tensor for name, tensor in initial.items() if not name.startswith("optimizer")}
    assert_same(found["tp1"], expected(model, [[0, 1, 2], [3, 4], [5, 6]]))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("", marks=pytest.mark.full),
        pytest.param("--tensor-model-parallel-size 2", marks=pytest.mark.full),
        "--pipeline-model-parallel-size 2",
    ],
)
def test_training_goes_on_from_it_under_any_layout_and_resumes(layout, tmp_path, write_config, train):
    save_interval = {"save-interval": 2}
    deep = write_config(tmp_path / "deep", recurrence={"pattern": "(*-)x8", "loop_scales": False})
    train(deep, flags="--train-iters 3 --lr-decay-iters 9")
    small = write_config(
        tmp_path / "small", megatron={"load": str(tmp_path / "compressed"), "finetune": True, **save_interval}
    )
    compressed(tmp_path / "deep/run", tmp_path / "compressed", small)
    ranks = 2 if layout else 1
    steps = train(small, ranks, f"--train-iters 6 {layout}")
    again = write_config(
        tmp_path / "again", megatron={"load": str(tmp_path / "compressed"), "finetune": True, **save_interval}
    )
    train(again, ranks, f"--train-iters 6 --exit-interval 4 {layout}")
    resumed = train(again, ranks, f"--train-iters 6 {layout}")
    # The resumed run goes on from its own checkpoint, with its optimizer, though the file says finetune.
    assert [step["iteration"] for step in resumed] == [1, 2, 3, 4, 5, 6]
    assert [step["loss"] for step in resumed] == pytest.approx([step["loss"] for step in steps], rel=1e-6)


@pytest.mark.full
def test_moments_are_averaged_on_request_and_load(tmp_path, write_config, train):
    deep = write_config(tmp_path / "deep", recurrence={"pattern": "(*-)x8", "loop_scales": False})
    train(deep, flags="--train-iters 3 --lr-decay-iters 20")
    small = write_config(tmp_path / "small", megatron={"load": str(tmp_path / "compressed")})
    ours = compressed(tmp_path / "deep/run", tmp_path / "compressed", small, optimizer="average")
    theirs = read(tmp_path / "deep/run/checkpoints/iter_0000003")
    role = "mlp.linear_fc2.weight"
    for kind in ("exp_avg", "exp_avg_sq"):
        pair = [theirs[f"optimizer.state.{kind}.decoder.layers.{number}.{role}"].double() for number in (5, 7)]
        mean = ((pair[0] + pair[1]) / 2).float()
        assert torch.equal(ours[f"optimizer.state.{kind}.decoder.layers.3.{role}"], mean)
        assert not ours[f"optimizer.state.{kind}.decoder.layers.3.mlp_bda.loop_scale"].any()
    steps = train(small, 2, "--train-iters 4 --tensor-model-parallel-size 2")
    anew = write_config(tmp_path / "anew", megatron={"load": str(tmp_path / "compressed"), "finetune": True})
    # The same weights, whatever is carried beside them: a copy of the weights in the optimizer must agree.
    assert steps[0]["loss"] == pytest.approx(train(anew, flags="--train-iters 4")[0]["loss"], rel=1e-5)
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4]


def test_the_optimizers_bytes_are_not_read_when_it_is_dropped(tmp_path, config):
    tensors = model_tensors(8)
    moments = {f"optimizer.state.exp_avg.{name}": torch.full_like(tensor, 7.25) for name, tensor in tensors.items()}
    save(tmp_path / "deep", {**tensors, **moments})
    source = open_checkpoint(tmp_path / "deep")
    for name in moments:
        for place in (chunk.place for chunk in source.tensors[name].chunks):
            with (source.folder / place.file).open("r+b") as file:
                file.seek(place.offset)
                file.write(b"\0" * place.length)
    ours = compressed(tmp_path / "deep", tmp_path / "small", config())
    assert_same(ours, expected(tensors, [[0, 1], [2, 3], [4, 5], [6, 7]]))
    with pytest.raises(CherryError, match="cannot read the tensor optimizer"):
        compressed(tmp_path / "deep", tmp_path / "other", config(), optimizer="average")


def test_loop_vectors_begin_at_one(tmp_path, config):
    save(tmp_path / "deep", model_tensors(8))
    ours = compressed(tmp_path / "deep", tmp_path / "small", config(recurrence={"loop_scales": True}))
    scales = {name: tensor for name, tensor in ours.items() if "loop_scale" in name}
    assert len(scales) == 2 * 4 and all(torch.equal(t, torch.ones(4 * 24)) for t in scales.values())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, config, capsys):
    save(tmp_path / "deep", model_tensors(8))
    before = sorted(tmp_path.rglob("*"))
    arguments = ["compress-depth", "--load", str(tmp_path / "deep"), "--save", str(tmp_path / "small")]
    path = config()
    assert main([*arguments, "--config", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "layer 2     core     from 4, 5" in printed and "no manifest" in printed and "dropped" in printed
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_random_layers_are_drawn_as_training_draws_them(tmp_path, config):
    tensors = model_tensors(8)
    save(tmp_path / "deep", tensors)
    ours = compressed(tmp_path / "deep", tmp_path / "one", config(), method="random")
    assert_same(ours, compressed(tmp_path / "deep", tmp_path / "two", config(), method="random"))
    other = compressed(tmp_path / "deep", tmp_path / "three", config(), method="random", seed=1)
    for name, tensor in ours.items():
        if not name.startswith("decoder.layers"):
            assert torch.equal(tensor, tensors[name]), "what is not a layer stays the parent's"
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert not torch.equal(tensor, other[name])
            # 10 effective layers of two sublayers
            std = 0.02 / 20**0.5 if "proj" in name or "fc2" in name else 0.02
            assert float(tensor.std()) == pytest.approx(std, rel=0.15)


def test_a_model_with_tied_embeddings_has_the_extra_state_that_training_asks_for(tmp_path, config):
    tensors = model_tensors(8)
    del tensors["output_layer.weight"]
    save(tmp_path / "deep", tensors)
    path = config(megatron={"untie-embeddings-and-output-weights": False})
    compressed(tmp_path / "deep", tmp_path / "small", path)
    assert "output_layer._extra_state/shard_0_1" in open_checkpoint(tmp_path / "small").objects


def test_what_training_changes_on_purpose_is_told_and_not_written(tmp_path, config):
    """One configuration serves the compression and the training that starts from it."""
    save(tmp_path / "deep", model_tensors(8))
    overrides = ("changed=[megatron.rotary-base, megatron.norm-epsilon]", "megatron.rotary-base=500000")
    surgery = compress.plan_compression(tmp_path / "deep", config(), overrides, compress.Options())
    assert [line for line in surgery.lines if line.startswith("changed")] == [
        "changed     megatron.rotary-base 500000 for 10000"
    ]
    surgery.run(tmp_path / "small", 1)
    assert open_checkpoint(tmp_path / "small").arguments()["rotary_base"] == 10000
    with pytest.raises(CherryError, match=r"was trained with 10000; set it so$"):  # no training starts from that
        compress.plan_expansion(tmp_path / "small", config(), overrides)
