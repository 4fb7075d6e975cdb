"""What a checkpoint says of itself is held against the configuration: by tensors, by arguments, by its record."""

import json
from pathlib import Path

import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.storage.fits import heads_of
from cherry_megatron.storage.trained import tokenizer_of, told_tokenizer
from cherry_megatron.surgery import compress
from tests.surgery.conftest import GROUPS, HEADS, SIZE, model_tensors, save

OPTIONS = compress.Options()
TRAINED = {
    "num_attention_heads": HEADS, "group_query_attention": True, "num_query_groups": GROUPS, "kv_channels": SIZE,
    "position_embedding_type": "rope", "normalization": "RMSNorm", "rotary_percent": 1.0, "window_size": None,
}  # fmt: skip
# One head more or less, with the size of each so that the tensors have the same shapes.
OTHER = {
    "heads": ({"num_attention_heads": 3, "num_query_groups": 1, "kv_channels": 8}, "num-attention-heads is 6, but"),
    "groups": ({"group_query_attention": False, "num_query_groups": 1}, "num-query-groups is 2, but"),
    "size": ({"kv_channels": 8}, "kv-channels is 4, but"),
    "rotary-base": ({"rotary_base": 500000}, "rotary-base is 10000, but"),
    "norm-epsilon": ({"layernorm_epsilon": 1e-6}, "norm-epsilon is 1e-05, but"),
    "window": ({"window_size": (128, 0)}, "window-size is None, but"),
    "window-of-some-layers": ({"window_attn_skip_freq": 2}, "window-attn-skip-freq is None, but"),
    "interleaved": ({"rotary_interleaved": True}, "rotary-interleaved is False, but"),
    "positions": ({"position_embedding_type": "none"}, "position_embedding_type 'none'; layers here have 'rope'"),
    "part-of-a-head": ({"rotary_percent": 0.25}, "rotary_percent 0.25"),
    "norms": ({"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
    "norms-around-one": ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma True"),
    "gate": ({"quick_geglu": True}, "quick_geglu True"),
    "layers": ({"hybrid_layer_pattern": "*-" * 9}, r"holds 8 layers \(16 sublayers\), .* by a training of 18"),
    "layers-of-a-gpt": ({"hybrid_layer_pattern": None, "num_layers": 9}, "by a training of 9"),
}  # fmt: skip


def test_what_it_was_trained_with_fits(tmp_path, config):
    for folder, more in (
        ("a", {}),
        ("b", {"hybrid_layer_pattern": None, "num_layers": 8}),
        ("c", {"num_layers": None}),
    ):
        save(tmp_path / folder, model_tensors(8), **{**TRAINED, **more})
        compress.plan_compression(tmp_path / folder, config(), (), OPTIONS)


def test_numbers_fit_however_they_are_written(tmp_path, config):
    save(tmp_path / "deep", model_tensors(8), **{**TRAINED, "layernorm_epsilon": 1e-6})
    for written in ("1e-6", "0.000001"):
        compress.plan_compression(tmp_path / "deep", config(), [f"megatron.norm-epsilon={written}"], OPTIONS)


@pytest.mark.parametrize(
    ("name", "trained", "key", "written"),
    [
        ("window_size", (8, 0), "window-size", "'8,0'"),
        ("window_size", (8, 0), "window-size", "(8, 0)"),
        ("window_size", [8, 0], "window-size", "(8,0)"),
        ("no_rope_freq", [0, 1] * 4, "no-rope-freq", "'([0,1]*4)'"),
        ("no_rope_freq", 2, "no-rope-freq", "2"),
        ("window_attn_skip_freq", [0, 0, 1], "window-attn-skip-freq", "'[0]*2+[1]'"),
    ],
)
def test_windows_and_kinds_of_layers_fit_however_they_are_written(name, trained, key, written, tmp_path, config):
    save(tmp_path / "deep", model_tensors(8), **{**TRAINED, name: trained})
    compress.plan_compression(tmp_path / "deep", config(), [f"megatron.{key}={written}"], OPTIONS)
    with pytest.raises(CherryError, match=f"megatron.{key} is None, but .* was trained with"):
        compress.plan_compression(tmp_path / "deep", config(), (), OPTIONS)


@pytest.mark.parametrize(
    "flags", [["--rotary-base", "500000"], ["--rotary-base=500000"], ["--seed", "3", "--rotary-base", "500000"]]
)
def test_the_flags_of_a_runs_own_configuration_count(flags, tmp_path, config):
    save(tmp_path / "deep", model_tensors(8), **{**TRAINED, "rotary_base": 500000})
    path = config(megatron={"rotary-base": 7})
    with pytest.raises(CherryError, match="rotary-base is 7, but"):
        compress.plan_compression(tmp_path / "deep", path, (), OPTIONS)
    path.write_text(path.read_text() + f"flags: {json.dumps(flags)}\n")
    compress.plan_compression(tmp_path / "deep", path, (), OPTIONS)
    with pytest.raises(CherryError, match=r"unknown Megatron flag --rotary-bas; did you mean 'rotary-base'"):
        compress.plan_compression(tmp_path / "deep", path, ("flags=['--rotary-bas=3']",), OPTIONS)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_query_groups_without_a_word_of_them_are_refused(groups, tmp_path, config):
    save(tmp_path / "deep", model_tensors(8), **TRAINED)
    path = config(megatron={"group-query-attention": None, "num-query-groups": groups})
    with pytest.raises(CherryError, match=f"num-query-groups {groups} does nothing without group-query-attention"):
        compress.plan_compression(tmp_path / "deep", path, (), OPTIONS)


@pytest.mark.parametrize("name", OTHER)
def test_another_function_of_the_same_tensors_is_refused(name, tmp_path, config):
    arguments, says = OTHER[name]
    save(tmp_path / "deep", model_tensors(8), **{**TRAINED, **arguments})
    with pytest.raises(CherryError, match=says):
        compress.plan_compression(tmp_path / "deep", config(), (), OPTIONS)


def short(tensors, end, place=0):
    """Take the last row, or with `place` 1 the last column."""
    name = next(name for name in reversed(tensors) if name.endswith(end))
    tensors[name] = tensors[name].narrow(place, 0, tensors[name].shape[place] - 1).clone()


SHAPES = {
    "attention-norm": lambda t: short(t, "linear_qkv.layer_norm_weight"),
    "all-mlp-norms": lambda t: t.update({n: v[:-1].clone() for n, v in t.items() if "fc1.layer_norm" in n}),
    "projection": lambda t: short(t, "linear_proj.weight", 1),
    "second-linear": lambda t: short(t, "linear_fc2.weight"),
    "final-norm": lambda t: short(t, "final_norm.weight"),
    "head": lambda t: short(t, "output_layer.weight"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_tensor_of_another_size_is_named(name, tmp_path, config):
    tensors = model_tensors(8)
    SHAPES[name](tensors)
    save(tmp_path / "deep", tensors)
    with pytest.raises(CherryError, match=r"is \[.*\], not \[.*\] like the rest"):
        compress.plan_compression(tmp_path / "deep", config(), (), OPTIONS)


def test_types_that_differ_between_groups_are_refused(tmp_path, config):
    tensors = model_tensors(8)
    first = ("decoder.layers.0.", "decoder.layers.1.", "decoder.layers.2.", "decoder.layers.3.")
    tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if name.startswith(first)}
    save(tmp_path / "deep", tensors)
    with pytest.raises(CherryError, match=r"is bfloat16, but embedding.word_embeddings.weight float32"):
        compress.plan_compression(tmp_path / "deep", config(), (), OPTIONS)


@pytest.mark.parametrize(
    ("megatron", "says"),
    [
        ({"num-query-groups": "two"}, "set megatron.num-query-groups to a positive number"),
        ({"num-query-groups": 0}, "set megatron.num-query-groups to a positive number"),
        ({"num-query-groups": 4}, "4 does not divide the 6 heads"),
        ({"num-attention-heads": None}, "set megatron.num-attention-heads to a positive number"),
        (
            {"num-attention-heads": 10},
            "24 is not a multiple of num-attention-heads 10; use .* or set megatron.kv-ch",
        ),
    ],
)
def test_heads_that_cannot_be_are_refused(megatron, says):
    given = {"num-attention-heads": HEADS, "group-query-attention": True, "num-query-groups": GROUPS, **megatron}
    with pytest.raises(CherryError, match=says):
        heads_of(Path("it.yaml"), given, 24)


@pytest.mark.parametrize(("key", "value"), [("injection", "add"), ("order", "sequence")])
def test_a_dense_equivalent_of_another_walk_is_refused(key, value, tmp_path, config):
    """The record of the checkpoint has it, and no tensor shows it."""
    save(tmp_path / "deep", model_tensors(4))
    walked = config(recurrence={"pattern": "*-[*-]x2*-", key: value})
    compress.plan_compression(tmp_path / "deep", walked, (), OPTIONS).run(tmp_path / "small", 2)
    path = config(recurrence={"pattern": "*-[*-]x2*-"})
    with pytest.raises(CherryError, match=rf"recurrence.{key} is \w+, but .* was made for {value}; set it so"):
        compress.plan_expansion(tmp_path / "small", path, ())
    loops = config(recurrence={"pattern": "*-[*-]x2*-", key: value, "loops": 1})
    if key == "order":
        compress.plan_expansion(tmp_path / "small", loops, ())  # fewer loops may be meant


def test_the_record_has_the_configuration_that_made_it(tmp_path, config):
    save(tmp_path / "deep", model_tensors(8))
    options = compress.Options(method="random", seed=3)
    overrides = ["megatron.init-method-std=0.5"]
    compress.plan_compression(tmp_path / "deep", config(), overrides, options).run(tmp_path / "small", 2)
    record = json.loads((tmp_path / "small/iter_0000000/lineage.json").read_text())
    assert record["settings"]["megatron"]["init-method-std"] == 0.5
    assert record["settings"]["megatron"]["hidden-size"] == 24


def test_layers_in_no_group_are_named(tmp_path, config):
    save(tmp_path / "deep", model_tensors(8))
    lines = compress.plan_compression(tmp_path / "deep", config(), (), compress.Options(groups="0,1,2+4,7")).lines
    assert "in none     3, 5, 6" in lines
    assert not [line for line in lines if line.startswith("in several")]


def test_layers_in_several_groups_are_named(tmp_path, config):
    """Which `slots` needs where there are fewer layers than slots."""
    save(tmp_path / "deep", model_tensors(8))
    lines = compress.plan_compression(
        tmp_path / "deep", config(), (), compress.Options(groups="0-1,1-4,4,5-7")
    ).lines
    assert "in several  1, 4" in lines


@pytest.mark.parametrize(("loops", "says"), [(0, "4 loops"), (3, "3 loops"), (1, None)])
def test_a_source_that_was_walked_in_loops_is_refused(loops, says, tmp_path, config):
    """Its tensors are those of four layers one after the other."""
    save(tmp_path / "deep", model_tensors(4))
    path, walked = config(recurrence={"pattern": "*-*-"}), f"recurrence={{pattern: '*-[*-*-]x4*-', loops: {loops}}}"
    compress.plan_compression(tmp_path / "deep", path, (walked,), OPTIONS).run(tmp_path / "looped", 2)
    if says is None:
        compress.plan_compression(tmp_path / "looped", path, (), OPTIONS)
        return
    with pytest.raises(CherryError, match=rf"looped/iter_0000000 is a recurrent model already \(.*{says}.*\)"):
        compress.plan_compression(tmp_path / "looped", path, (), OPTIONS)
    compress.plan_expansion(tmp_path / "looped", path, (walked,)).run(tmp_path / "dense", 2)
    compress.plan_compression(tmp_path / "dense", path, (), OPTIONS)


@pytest.mark.parametrize("flag", ["qk-layernorm", "attention-output-gate", "add-qkv-bias"])
def test_what_training_would_refuse_is_not_written(flag, tmp_path, config):
    save(tmp_path / "deep", model_tensors(8))
    with pytest.raises(CherryError, match=rf"config.yaml: megatron.{flag}: the attention is .*; take it out"):
        compress.plan_compression(tmp_path / "deep", config(), (f"megatron.{flag}=true",), OPTIONS)


def test_a_tokenizer_is_told_by_its_folder_and_whether_it_is_there(tmp_path):
    folder = tmp_path / "tokenizer"
    source = open_checkpoint(save(tmp_path / "deep", model_tensors(2), tokenizer_model=str(folder)))
    folder.mkdir()
    (folder / "tokenizer.json").write_text("first")
    known = tokenizer_of(source)
    assert told_tokenizer(source) == f"{folder} ({known})"
    record = {"operation": "pretrain", "identity": "0", "parents": [], "tokenizer": known}
    (source.folder / "lineage.json").write_text(json.dumps(record))
    (folder / "tokenizer.json").write_text("second")
    assert told_tokenizer(source) == f"{folder} ({known}, where another one is now)"
    (folder / "tokenizer.json").unlink()
    assert told_tokenizer(source) == f"{folder} ({known}, which is missing there now)"
