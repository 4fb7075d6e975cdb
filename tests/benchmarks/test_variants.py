"""Variants are built and compared: equal weights and tokens, and a difference where there is one."""

import os
import sys

import torch

from tests.benchmarks.conftest import FOLDER
from tests.conftest import run_ranks


def measured(path):
    sys.path.insert(0, str(FOLDER))
    import variants

    from cherry_megatron.config import load

    at = variants.bench(load(path, []), 2)
    first, again, other = (
        at.measure(variants.Variant(args, config))
        for args, config in (
            ({}, {}),
            ({}, {}),
            (
                {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
                {"bias_dropout_fusion": True},
            ),
        )
    )
    parts = {
        name: variants.row(name, found, first, 64).split(" | ")[-2:]
        for name, found in (("again", again), ("other", other))
    }
    return {name: [float(part.strip(" |")) for part in both] for name, both in parts.items()}


def test_variants_are_compared(tmp_path, write_config):
    (found,) = run_ranks(tmp_path, 1, measured, write_config(tmp_path))
    assert found["again"] == [0, 0]
    loss, gradient = found["other"]  # its gradient is rounded to BF16
    assert loss <= 1e-5
    assert 1e-4 < gradient < 1e-2


class Named(torch.nn.Module):
    """Parameters of the given names, in their order, each with its gradient."""

    def __init__(self, gradients):
        super().__init__()
        for name, value in gradients.items():
            *path, last = name.split(".")
            at = self
            for part in path:
                if part not in dict(at.named_children()):
                    at.add_module(part, torch.nn.Module())
                at = at.get_submodule(part)
            parameter = torch.nn.Parameter(torch.zeros(2))
            parameter.main_grad = torch.tensor(value)
            at.register_parameter(last, parameter)


def test_gradients_are_held_against_those_of_the_same_name(benchmark_script):
    """A norm within the next linear layer has another name there, and another place."""
    alone = {
        "layers.0.input_layernorm.weight": [1.0, 2.0],
        "layers.0.self_attention.linear_qkv.weight": [3.0, 4.0],
        "layers.1.pre_mlp_layernorm.weight": [5.0, 6.0],
        "layers.1.mlp.linear_fc1.weight": [7.0, 8.0],
    }
    in_linear = {
        "layers.0.self_attention.linear_qkv.layer_norm_weight": [1.0, 2.0],
        "layers.0.self_attention.linear_qkv.weight": [3.0, 4.0],
        "layers.1.mlp.linear_fc1.weight": [7.0, 8.0],
        "layers.1.mlp.linear_fc1.layer_norm_weight": [5.0, 6.0],
    }
    gradients_of = benchmark_script("variants").gradients_of
    assert torch.equal(gradients_of(Named(alone)), gradients_of(Named(in_linear)))


def backends(path):
    sys.path.insert(0, str(FOLDER))
    import variants

    from cherry_megatron.config import load

    at, found = variants.bench(load(path, []), 2), []
    for name in ("flash", "auto"):
        variants._forget()
        model = at.build(variants.Variant({"attention_backend": name}))
        found.append((model.config.attention_backend.name, os.environ["NVTE_FUSED_ATTN"]))
    return found


def test_each_variant_chooses_its_attention_anew(tmp_path, write_config):
    (found,) = run_ranks(tmp_path, 1, backends, write_config(tmp_path))
    assert found == [("flash", "0"), ("auto", "1")]


def test_a_variant_that_does_not_run_is_a_row(benchmark_script):
    failed = benchmark_script("variants").failed
    assert failed("one", AssertionError()) == "| one | AssertionError:  | | | | | |"
    assert failed("two", ValueError("a | b\nmore")) == "| two | ValueError: a / b | | | | | |"
