"""Bytes that a rank sends in a training step, by collective and group, beside the formulas of docs/moee.md.

    torchrun --nproc-per-node 2 benchmarks/exchanged_bytes.py --config configs/tiny_moee.yaml
        --set megatron.expert-model-parallel-size=2 [--set KEY=VALUE ...] [--output RESULT.json]

Counts the calls of torch.distributed within the steps, on a CPU as on GPUs: an all-to-all sends all but a rank's
own part, an all-gather its part to every other, a reduce-scatter all but its own part, an all-reduce twice that.
Set the micro-batch to all sequences of a rank: an extra pass over several (docs/moee.md) lies before the step.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from cherry_megatron.cli import main as cherry
from cherry_megatron.config import load
from cherry_megatron.platform.machine import prepare

# name: (share of an argument's bytes that is sent, by the size of the group; the argument's place and name)
COUNTED: dict[str, tuple[Callable[[int], float], int, str]] = {
    "all_gather_into_tensor": (lambda n: n - 1, 1, "input_tensor"),
    "reduce_scatter_tensor": (lambda n: (n - 1) / n, 1, "input"),
    "all_reduce": (lambda n: 2 * (n - 1) / n, 0, "tensor"),
}


class Count:
    """Bytes that this rank has sent, by (group, collective), while `running`."""

    def __init__(self) -> None:
        self.sent: Counter[tuple[str, str]] = Counter()
        self.running = False
        self.steps = 0

    def listen(self) -> None:
        """Count from now on what torch.distributed is told."""
        for name, rule in COUNTED.items():
            setattr(torch.distributed, name, self._counted(name, *rule))
        torch.distributed.all_to_all_single = self._counted_all_to_all(torch.distributed.all_to_all_single)
        from megatron.core.distributed import param_and_grad_buffer as gradients

        from cherry_megatron.platform import steps

        gradients.dist_all_gather_func = torch.distributed.all_gather_into_tensor
        gradients.dist_reduce_scatter_func = torch.distributed.reduce_scatter_tensor

        original = steps._train_step

        @wraps(original)
        def step(*values: Any, **named: Any) -> Any:
            self.running, self.steps = True, self.steps + 1
            try:
                return original(*values, **named)
            finally:
                self.running = False

        steps._train_step = step

    def _counted(self, name: str, share: Callable[[int], float], place: int, argument: str) -> Callable[..., Any]:
        original = getattr(torch.distributed, name)

        @wraps(original)
        def call(*values: Any, **named: Any) -> Any:
            tensor = named[argument] if argument in named else values[place]
            self._add(name, named.get("group"), share, tensor.nbytes)
            return original(*values, **named)

        return call

    def _counted_all_to_all(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(output: Any, input: Any, *values: Any, **named: Any) -> Any:
            group, splits = named.get("group"), named.get("input_split_sizes")
            rows = input.shape[0]
            ranks = torch.distributed.get_world_size(group)
            own = rows // ranks if splits is None else int(splits[torch.distributed.get_rank(group)])
            self._add("all_to_all_single", group, lambda _: 1, input.nbytes * (rows - own) // max(rows, 1))
            return original(output, input, *values, **named)

        return call

    def _add(self, name: str, group: Any, share: Callable[[int], float], size: int) -> None:
        ranks = torch.distributed.get_world_size(group)
        if self.running and ranks > 1:
            self.sent[_label(group), name] += round(share(ranks) * size)


def _label(group: Any) -> str:
    from megatron.core import mpu

    known = {
        "expert-parallel": mpu.get_expert_model_parallel_group(),
        "tensor-parallel": mpu.get_tensor_model_parallel_group(),
        "data-parallel of experts": mpu.get_expert_data_parallel_group(),
        "data-parallel": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    return next((name for name, found in known.items() if found is group), "other")


def formula(config: Any) -> str:
    """What docs/moee.md expects of a rank's experts, bytes for each of its tokens."""
    over, depths = config.value("expert-model-parallel-size"), config.mtp.depths
    if config.moee is not None:
        each = 8 + 2 * 4 * (1 + depths) * config.moee.experts / over
        rows = config.moee.experts / config.value("seq-length") if config.moee.routes else 0.0
        return f"{(over - 1) * (each + rows):.3f}"
    width = 2 if config.value("bf16") else 4
    walks = config.recurrence.loops * len(config.recurrence.parsed.core)
    copies = walks * config.shape.top_k * (over - 1) / over
    return f"{4 * copies * config.shape.hidden * width + 2 * 4 * copies:.0f} and the counts, if all is even"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, help="the table as JSON, bytes a step by group and collective")
    options = parser.parse_args()
    prepare()
    count = Count()
    count.listen()
    overrides = [text for override in options.set for text in ("--set", override)]
    if status := cherry(["pretrain", "--config", str(options.config), *overrides]):
        raise SystemExit(status)
    if os.environ["RANK"] != "0":
        return
    config = load(options.config, options.set)
    ranks = int(os.environ["WORLD_SIZE"]) // config.value("tensor-model-parallel-size")
    tokens = config.value("global-batch-size") * config.value("seq-length") // ranks
    print(
        f"\n{count.steps} steps, {tokens} tokens a step on this rank; experts by the formula: "
        f"{formula(config)} a token"
    )
    print("| group | collective | bytes a step | a token |\n|---|---|---|---|")
    found = {f"{group}, {name}": sent / count.steps for (group, name), sent in sorted(count.sent.items())}
    for name, each in found.items():
        print(f"| {name.replace(', ', ' | ')} | {each:,.0f} | {each / tokens:,.3f} |")
    if options.output is not None:
        options.output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
