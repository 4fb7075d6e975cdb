"""Checkpoints of Megatron's own GPTModel, whose layers are stacked in one tensor or numbered."""

from pathlib import Path

import pytest
import torch

from cherry_megatron.surgery import compress
from tests.conftest import run_ranks
from tests.surgery.conftest import FFN, GROUPS, HEADS, HIDDEN, VOCABULARY, read
from tests.surgery.test_compress import assert_same, expected

LAYERS = 8


def _save_gpt(folder: Path, numbered: bool) -> None:
    from argparse import Namespace

    from cherry_megatron.platform.machine import prepare

    prepare()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.random.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=GROUPS, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, normalization="RMSNorm", use_cpu_initialization=True,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), VOCABULARY, 16,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": numbered})
    common = {"args": Namespace(num_layers=LAYERS), "checkpoint_version": 3.0, "iteration": 3}
    (folder / "iter_0000003").mkdir(parents=True)
    dist_checkpointing.save({**common, **state}, folder / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    torch.save(dict(model.named_parameters()), folder / "parameters.pt")


@pytest.mark.parametrize("numbered", [False, True], ids=["stacked", "numbered"])
def test_layers_of_a_gpt_model_are_averaged(numbered, tmp_path, config):
    run_ranks(tmp_path / "out", 1, _save_gpt, tmp_path / "gpt", numbered)
    path = config()
    compress.plan_compression(tmp_path / "gpt", path, (), compress.Options()).run(tmp_path / "small", 2)
    parameters = torch.load(tmp_path / "gpt/parameters.pt", weights_only=False)
    names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        "decoder.final_layernorm.": "decoder.final_norm.",
    }
    tensors = {}
    for name, tensor in parameters.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name.startswith("decoder.layers."):
            layer, role = name.removeprefix("decoder.layers.").split(".", 1)
            name = f"decoder.layers.{2 * int(layer) + role.startswith('mlp')}.{role}"
        tensors[name] = tensor.detach()
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert_same(read(tmp_path / "small/iter_0000000"), expected(tensors, groups))
