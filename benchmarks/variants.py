"""Forward and backward pass of a model by variant of its kernels, one GPU, one process, some seconds each.

    python benchmarks/variants.py --tokenizer DIR --output RESULT.md [--config cherry_227m] [--set KEY=VALUE ...]
        [--micro-batch 4] [--only NAME ...]

For each variant the model is built anew with the same weights and the same random tokens, run eagerly and replayed
as one CUDA graph, and its kernels are counted by class. Beside the times stand the differences from the first
variant, of the summed loss and of all gradients: a fast path that computes something else shows itself here. No
optimizer, no data, no other rank: train_speed.py has whole steps. Without a GPU it runs eagerly, without classes.
"""

import argparse
import contextlib
import copy
import gc
import importlib.util
import io
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cherry_megatron.config import Config, load
from cherry_megatron.platform.machine import prepare
from cherry_megatron.versions import git_state

WARM_UP, REPEATS, TRACED = 3, 8, 2


@dataclass(frozen=True)
class Variant:
    """What differs from the configuration.

    Attributes:
        args: Megatron's arguments, by their names in its own namespace.
        config: fields of the transformer configuration, of which there is no argument.
        fused_gradients: Transformer Engine's products add their weights' gradients to main_grad themselves.
        norms: Transformer Engine's instead of ours: `linear` in one module with the next linear layer, as Megatron
            has them; `residual` with the residual stream's gradient.
        rotation: Transformer Engine's of the unsplit product, instead of ours.
    """

    args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    fused_gradients: bool = False
    norms: str = ""
    rotation: bool = False


_LOSS = {"cross_entropy_loss_fusion": False}
_NATIVE = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"}
_ROTATION, _SWIGLU = {"fused_single_qkv_rope": False}, {"use_te_activation_func": False}
_DELAYED, _TENSORWISE = ({"fp8": "hybrid", "fp8_recipe": recipe} for recipe in ("delayed", "tensorwise"))
VARIANTS = {
    "as configured": Variant(),
    "cross-entropy in float32": Variant(config=_LOSS),
    "Megatron's fused cross-entropy": Variant(config=_NATIVE),
    "rotary positions on split qkv": Variant(config=_ROTATION),
    "TE's rotary positions on unsplit qkv": Variant(rotation=True),
    "Megatron's SwiGLU": Variant(config=_SWIGLU),
    "norms in the linear layers": Variant(norms="linear"),
    "TE's norms with the residual": Variant(config={"fused_residual_rmsnorm": True}, norms="residual"),
    "all of these, Megatron's defaults": Variant(config={**_LOSS, **_ROTATION, **_SWIGLU}, norms="linear"),
    "weight gradients into main_grad": Variant(fused_gradients=True),
    "attention by flash-attention": Variant({"attention_backend": "flash"}),
    "FP8 delayed": Variant(_DELAYED),
    "FP8 delayed, norms in the linear layers": Variant(_DELAYED, norms="linear"),
    "FP8 delayed, weight gradients into main_grad": Variant(_DELAYED, fused_gradients=True),
    "FP8 tensorwise": Variant(_TENSORWISE),
    "FP8 delayed, Megatron's defaults": Variant(_DELAYED, {**_LOSS, **_ROTATION, **_SWIGLU}, norms="linear"),
}


@dataclass
class Found:
    """Of a variant: seconds of a pass, memory, what it computes, and its kernels."""

    eager: float
    graph: float | None
    peak_gib: float
    loss: float
    gradients: Tensor
    kernels: list[str]


def norms_of(submodules: Any, kind: str) -> Any:
    """The specs with Transformer Engine's norms, of one of the kinds in `Variant`."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
    )
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP

    alone = kind == "residual"
    norm: Any = partial(TENorm, has_residual=True) if alone else IdentityOp
    linear = TEColumnParallelLinear if alone else TELayerNormColumnParallelLinear
    for sublayer in (submodules.attention_layer, submodules.mlp_layer):
        sublayer.params["looped"] = lambda given: given
    attention, mlp = submodules.attention_layer.submodules, submodules.mlp_layer.submodules
    attention.input_layernorm = mlp.pre_mlp_layernorm = norm
    attention.self_attention.submodules = replace(attention.self_attention.submodules, linear_qkv=linear)
    parts = replace(mlp.mlp.keywords["submodules"], linear_fc1=linear)
    mlp.mlp = partial(MLP.as_mlp_submodule, submodules=parts)
    return submodules


def _rotation_of_transformer_engine() -> Callable[..., Any]:
    from transformer_engine.pytorch.attention.rope import apply_fused_qkv_rotary_pos_emb

    found: Callable[..., Any] = apply_fused_qkv_rotary_pos_emb
    return found


def gradients_of(model: Any) -> Tensor:
    """All of them in the order of their names, whether a norm stands alone or is part of the next linear layer."""
    from cherry_megatron.model.specs import _NORM_KEYS

    found = {}
    for name, parameter in model.named_parameters():
        for alone, in_linear in _NORM_KEYS.items():
            name = name.replace(in_linear, alone)
        found[name] = parameter.main_grad.flatten().cpu()
    return torch.cat([found[name] for name in sorted(found)])


class Bench:
    """Builds and measures.

    Args:
        config: what is built.
        args: Megatron's arguments of it.
        size: sequences of a pass.
    """

    def __init__(self, config: Config, args: Any, size: int) -> None:
        self.config, self.args, self.size = config, args, size
        device = torch.cuda.current_device()
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(config.shape.vocabulary, (size, args.seq_length + 1), generator=generator).to(device)
        self.tokens, self.labels = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
        self.positions = torch.arange(args.seq_length, device=device).expand(size, -1)

    def build(self, variant: Variant) -> Any:
        """The model in Megatron's wrapper that keeps gradients in float32."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.full_cuda_graph import get_shared_capture_stream
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.module import Float16Module
        from megatron.training.arguments import core_transformer_config_from_args

        from cherry_megatron.model import build
        from cherry_megatron.model.fused import rotate_qkv
        from cherry_megatron.platform.rotation import rotate_by

        args = copy.copy(self.args)
        for name, value in variant.args.items():
            kind = type(getattr(args, name))
            setattr(args, name, kind[value] if issubclass(kind, Enum) else value)
        config = build.prepare_config(core_transformer_config_from_args(args), self.config.recurrence)
        for name, value in variant.config.items():
            setattr(config, name, value)
        rotate_by(_rotation_of_transformer_engine() if variant.rotation else rotate_qkv)
        specs = build.stack_submodules
        if variant.norms:
            build.stack_submodules = lambda *given: norms_of(specs(*given), variant.norms)
        try:
            model: Any = build.build_model(
                config, self.config.recurrence, self.config.shape, self.config.plan(),
                ProcessGroupCollection.use_mpu_process_groups(), sequence_length=args.max_position_embeddings,
                rotary_base=args.rotary_base, seed=args.seed, pre_process=True, post_process=True,
            )  # fmt: skip
        finally:
            build.stack_submodules = specs
        # Not by the configuration: the output layer, which is Megatron's own, would ask for apex.
        for module in model.modules():
            if variant.fused_gradients and hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
        model = model.cuda(torch.cuda.current_device())
        if args.bf16:
            model = Float16Module(config, model)
        # As in Megatron: what autograd keeps of the parameters belongs to the stream that a graph is recorded on.
        stream = get_shared_capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ours = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
            wrapped = DistributedDataParallel(config, ours, model)
        torch.cuda.current_stream().wait_stream(stream)
        return wrapped

    def measure(self, variant: Variant) -> Found:
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
        _forget()
        model = self.build(variant)

        def run() -> Tensor:
            model.zero_grad_buffer()
            model.set_is_first_microbatch()  # FP8 copies of the weights are made anew, with the scales of now
            losses: Tensor = model(self.tokens, self.positions, None, labels=self.labels)
            total = losses.float().sum()
            total.backward()
            return total.detach()

        eager = _seconds(run, WARM_UP)
        graph, kernels, loss = None, [], run()
        if has_gpu:
            replay, loss = _recorded(run)
            graph, kernels = _seconds(replay, 1), _kernels(replay)
        peak = torch.cuda.max_memory_allocated() / 2**30 if has_gpu else 0.0
        return Found(eager, graph, peak, float(loss), gradients_of(model), kernels)


def _forget() -> None:
    """Let go of what the variant before has decided for the whole process: attention, and scales of FP8."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine"):
        from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        _attention_backends["backend_selection_requires_update"] = True
        FP8GlobalStateManager.reset()


def _seconds(run: Callable[[], Any], warm_up: int) -> float:
    """The median of some calls."""
    found = []
    for repeat in range(warm_up + REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repeat >= warm_up:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def _recorded(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of it, recorded as Megatron records a step, and where its result lies."""
    from megatron.core.full_cuda_graph import get_shared_capture_stream
    from megatron.core.tensor_parallel.random import get_all_rng_states

    stream = get_shared_capture_stream()
    if hasattr(torch.autograd.graph, "set_override_stale_capture_stream"):
        torch.autograd.graph.set_override_stale_capture_stream(True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    for state in get_all_rng_states().values():
        graph.register_generator_state(state)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        total = run()
    return graph.replay, total


def _kernels(replay: Callable[[], None]) -> list[str]:
    """Lines of profile_step.py on some replays."""
    from profile_step import report

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(TRACED):
            replay()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        return report(json.loads(Path(file.name).read_text())["traceEvents"], TRACED)


def bench(config: Config, size: int) -> Bench:
    """Megatron ready on this one process."""
    machine = prepare()
    from megatron.core import mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from cherry_megatron.pretrain import initialize

    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all of them
        args = initialize(config, machine, {})
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if machine.devices else "gloo")
        mpu.initialize_model_parallel()
        graphs = {"te_rng_tracker": True, "use_cudagraphable_rng": True} if machine.devices else {}
        model_parallel_cuda_manual_seed(1, **graphs)
    if machine.devices:
        args.cuda_graph_impl = "full_iteration"  # kernels choose forms that can be recorded
    return Bench(config, args, size)


def row(name: str, found: Found, first: Found, tokens: int) -> str:
    """A line of the table."""
    loss = abs(found.loss - first.loss) / abs(first.loss)
    gradient = float((found.gradients - first.gradients).norm() / first.gradients.norm())
    graph = "- | -" if found.graph is None else f"{found.graph * 1e3:.1f} | {tokens / found.graph:,.0f}"
    return f"| {name} | {graph} | {found.eager * 1e3:.1f} | {found.peak_gib:.1f} | {loss:.1e} | {gradient:.1e} |"


def failed(name: str, error: Exception) -> str:
    """A line of the table for a variant that does not run here."""
    says = (str(error).splitlines() or [""])[0][:120].replace("|", "/")
    return f"| {name} | {type(error).__name__}: {says} | | | | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default="cherry_227m", help="of configs/, or a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    os.environ["CHERRY_TOKENIZER"] = options.tokenizer
    path = Path(options.config)
    at = bench(load(path if path.is_file() else Path(f"configs/{path}.yaml"), options.set), options.micro_batch)
    tokens = options.micro_batch * at.args.seq_length
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    head = [
        "# Forward and backward pass by variant",
        "",
        f"`python {shlex.join(sys.argv)}` on one "
        f"{device}, torch {torch.__version__}, commit {git_state().get('commit', 'unknown')}. Differences are from "
        "the first row.",
        "",
        "| variant | graph, ms | tokens/s | eager, ms | peak GiB | loss differs | gradients differ |",
        "|---|---|---|---|---|---|---|",
    ]
    rows, kernels, first = [], [], None
    for name in options.only:
        try:
            found = at.measure(VARIANTS[name])
        except Exception as error:  # one that does not run must not end the others
            rows.append(failed(name, error))
        else:
            first = first or found
            rows.append(row(name, found, first, tokens))
            kernels += ["", f"## {name}", "", *found.kernels]
            del found
        print(rows[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        options.output.write_text("\n".join([*head, *rows, *kernels]) + "\n")


if __name__ == "__main__":
    main()
