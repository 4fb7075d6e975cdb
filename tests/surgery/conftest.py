"""Small checkpoints as torch.distributed.checkpoint itself writes them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 24, 20, 6, 2, 40
SIZE = HIDDEN // HEADS


def layer_tensors(prefix: str, draw: Any) -> dict[str, Any]:
    """One layer, as a HybridModel numbers it: attention, then MLP."""
    number = int(prefix)
    attention, mlp = f"decoder.layers.{2 * number}.self_attention", f"decoder.layers.{2 * number + 1}.mlp"
    return {
        f"{attention}.linear_qkv.layer_norm_weight": 1 + draw(HIDDEN) / 10,
        f"{attention}.linear_qkv.weight": draw((HEADS + 2 * GROUPS) * SIZE, HIDDEN),
        f"{attention}.linear_proj.weight": draw(HIDDEN, HEADS * SIZE),
        f"{mlp}.linear_fc1.layer_norm_weight": 1 + draw(HIDDEN) / 10,
        f"{mlp}.linear_fc1.weight": draw(2 * FFN, HIDDEN),
        f"{mlp}.linear_fc2.weight": draw(HIDDEN, FFN),
    }


def model_tensors(layers: int, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """A whole dense model."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))

    tensors = {"embedding.word_embeddings.weight": draw(VOCABULARY, HIDDEN)}
    for number in range(layers):
        tensors |= layer_tensors(str(number), draw)
    return tensors | {"decoder.final_norm.weight": draw(HIDDEN), "output_layer.weight": draw(VOCABULARY, HIDDEN)}


def save(folder: Path, tensors: dict[str, Any], **arguments: Any) -> Path:
    """Write iteration 7 of a run of these further arguments with torch; returns the folder to load."""
    import torch.distributed.checkpoint as dcp

    numbered = {
        name.split(".")[2]: "*" if "attention" in name else "-"
        for name in tensors
        if name.startswith("decoder.layers.")
    }
    args = argparse.Namespace(
        **{
            "num_layers": len(numbered),
            "consumed_train_samples": 70,
            "hybrid_layer_pattern": "".join(numbered.values()),
            "rotary_base": 10000,
            "layernorm_epsilon": 1e-5,
            **arguments,
        }
    )
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "optimizer": {"param_groups": [{"step": 7}]}}
    state = {**tensors, "common_state/shard_0_1": [common]}
    writer = dcp.FileSystemWriter(folder / "iter_0000007", thread_count=2)
    dcp.save(state, storage_writer=writer, planner=dcp.DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def read(folder: Path, names: list[str] | None = None) -> dict[str, Any]:
    """All tensors of a checkpoint, through torch."""
    import torch
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in metadata.items()
        if hasattr(found, "size") and (names is None or name in names)
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Write the configuration of a compressed model; keyword arguments are sections merged over the defaults."""

    def write(**sections: dict[str, Any]) -> Path:
        content = {
            "run": str(tmp_path / "run"),
            "recurrence": {"pattern": "*-[*-*-]x4*-", **sections.get("recurrence", {})},
            "megatron": {
                "hidden-size": HIDDEN, "ffn-hidden-size": FFN, "num-attention-heads": HEADS, "swiglu": True,
                "group-query-attention": True, "num-query-groups": GROUPS, "padded-vocab-size": VOCABULARY,
                "untie-embeddings-and-output-weights": True, **sections.get("megatron", {}),
            },
        }  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
