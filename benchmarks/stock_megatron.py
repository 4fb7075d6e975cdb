"""Stock Megatron in train_speed.py: its GPTModel with untied layers, its training loop, its default flags.

    python benchmarks/stock_megatron.py --config configs/cherry_227m.yaml [--set KEY=VALUE ...] --output RESULT.json
        [--layers 34] [--sequences 8] [--micro-batch 4] [--steps 24]

Sizes and what concerns several ranks are the configuration's, everything else is Megatron's default. Tokens are
random.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cherry_megatron.config import Config, load
from cherry_megatron.flags import megatron_arguments
from cherry_megatron.platform.machine import Machine, prepare


class Tokens(torch.utils.data.Dataset):
    """Random tokens."""

    def __init__(self, samples: int, length: int, vocabulary: int) -> None:
        self.samples, self.length, self.vocabulary = samples, length, vocabulary

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(self.vocabulary, (self.length + 1,), generator=generator)


# Of a configuration.
LAYOUT = (
    "tensor-model-parallel-size", "pipeline-model-parallel-size", "use-distributed-optimizer",
    "overlap-grad-reduce", "overlap-param-gather",
)  # fmt: skip


def flags(config: Config, machine: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """Of Megatron's command line."""
    shape = config.shape
    return {
        **machine.flags,
        **{flag: config.value(flag) for flag in LAYOUT},
        **_stages(options.layers, config.value("pipeline-model-parallel-size")),
        "num-layers": options.layers,
        "hidden-size": shape.hidden,
        "ffn-hidden-size": shape.ffn,
        "num-attention-heads": shape.heads,
        "seq-length": config.value("seq-length"),
        "max-position-embeddings": config.value("seq-length"),
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable-bias-linear": True,
        "position-embedding-type": "rope",
        "untie-embeddings-and-output-weights": True,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": shape.vocabulary - 1,  # and one for the end of a document
        "padded-vocab-size": shape.vocabulary,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "bf16": config.value("bf16"),
        # Without Transformer Engine its norms know nothing of it.
        "sequence-parallel": config.value("sequence-parallel") and bool(machine.devices),
        "micro-batch-size": options.micro_batch,
        "global-batch-size": options.sequences,
        "train-iters": options.steps,
        "lr": 3e-4,
        "eval-iters": 0,
        "eval-interval": options.steps,
        "log-interval": 1,
    }


def _stages(layers: int, pipeline: int) -> dict[str, int]:
    """Fewer layers on the first and the last stage, where the stages are not even."""
    ends = layers // pipeline
    return {} if layers % pipeline == 0 else {
        "decoder-first-pipeline-num-layers": ends, "decoder-last-pipeline-num-layers": ends,
    }  # fmt: skip


def provide_model(**stages: Any) -> torch.nn.Module:
    """Megatron's model provider."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    engine = args.transformer_impl == "transformer_engine"
    spec = (
        get_gpt_layer_with_transformer_engine_spec()
        if engine
        else get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    return GPTModel(
        core_transformer_config_from_args(args),
        spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=stages.get("pre_process", True),
        post_process=stages.get("post_process", True),
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        pg_collection=stages.get("pg_collection"),
    )


def forward_step(iterator: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron's forward step: the mean cross-entropy of the next tokens."""
    rows = next(iterator).to(torch.cuda.current_device())
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        number = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
        return losses.float().sum(), number, {}

    return model(tokens, positions, None, labels=labels), loss


def train(given: dict[str, Any]) -> list[float]:
    """Seconds of each step but the first: between the ends of two."""
    sys.argv = ["stock", *megatron_arguments(given)]
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    ends: list[float] = []
    original = training.training_log

    def logged(*values: Any, **named: Any) -> Any:  # called when a step is over
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return original(*values, **named)

    def datasets(samples: list[int]) -> tuple[Tokens, None, None]:
        return Tokens(samples[0], args.seq_length, args.padded_vocab_size), None, None

    datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads: random tokens cost nothing

    training.training_log = logged
    pretrain(
        pretrain_cfg_container_from_args(args), datasets, ModelType.encoder_or_decoder, forward_step, provide_model
    )
    return [end - began for began, end in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--sequences", type=int, default=8, help="of a step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    machine, config = prepare(), load(options.config, options.set)
    seconds = train(flags(config, machine, options))
    peak = torch.cuda.max_memory_allocated() / 2**30
    if int(os.environ["RANK"]) != int(os.environ["WORLD_SIZE"]) - 1:  # as `cherry pretrain`: of the last stage
        return
    options.output.write_text(json.dumps({"seconds": seconds, "peak_gib": peak}) + "\n")


if __name__ == "__main__":
    main()
