"""Checkpoints of Megatron's own GPTModel, whose layers are stacked in one tensor or numbered."""

import re
from pathlib import Path

import pytest
import torch

from cherry_megatron.surgery import compress
from tests.conftest import run_ranks
from tests.surgery.conftest import FFN, GROUPS, HEADS, HIDDEN, VOCABULARY, read
from tests.surgery.test_compress import assert_same, expected

LAYERS = 8


def _save_gpt(folder: Path, numbered: bool, ranks: int) -> None:
    from argparse import Namespace

    from cherry_megatron.platform.machine import prepare

    prepare()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    tensor_parallel.random.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=GROUPS, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, normalization="RMSNorm", use_cpu_initialization=True,
        tensor_model_parallel_size=ranks,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), VOCABULARY, 16,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": numbered})
    common = {"args": Namespace(num_layers=LAYERS), "checkpoint_version": 3.0, "iteration": 3}
    (folder / "iter_0000003").mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save({**common, **state}, folder / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")


@pytest.mark.parametrize(
    ("numbered", "ranks"),
    [(False, 2), (True, 1), *(pytest.param(*rest, marks=pytest.mark.full) for rest in ((False, 1), (True, 2)))],
)
def test_layers_of_a_gpt_model_are_averaged(numbered, ranks, tmp_path, config):
    run_ranks(tmp_path / "out", ranks, _save_gpt, tmp_path / "gpt", numbered, ranks)
    compress.plan_compression(tmp_path / "gpt", config(), (), compress.Options()).run(tmp_path / "small", 2)
    names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        "decoder.final_layernorm.": "decoder.final_norm.",
    }
    tensors = {}
    for name, tensor in read(tmp_path / "gpt/iter_0000003").items():  # through torch
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", name)
        if found is None:
            tensors[name] = tensor
            continue
        for layer in range(LAYERS) if found[1] is None else [int(found[1])]:
            place = 2 * layer + found[2].startswith("mlp")
            tensors[f"decoder.layers.{place}.{found[2]}"] = tensor if found[1] else tensor[layer]
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert_same(read(tmp_path / "small/iter_0000000"), expected(tensors, groups))
