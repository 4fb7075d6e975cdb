"""Wires megatron.training.pretrain(): configuration, model, data, loss, monitor."""

import contextlib
import copy
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training import pretrain as megatron_pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

from cherry_megatron.around_step import AroundStep
from cherry_megatron.checkpoints import start_from, unchanged_start, where_from
from cherry_megatron.checks import require
from cherry_megatron.config import Config
from cherry_megatron.data.batches import build_datasets, build_held_out
from cherry_megatron.distillation import Teacher
from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write
from cherry_megatron.flags import megatron_arguments
from cherry_megatron.keeping import Keeping
from cherry_megatron.loading import Loading
from cherry_megatron.model.build import build_mixture, build_model, prepare_config
from cherry_megatron.model.fused import rotate_qkv
from cherry_megatron.monitor.accounting import training_flops
from cherry_megatron.monitor.board import board
from cherry_megatron.monitor.console import Console
from cherry_megatron.monitor.evaluation import LoopEvaluation
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.objective import Objective
from cherry_megatron.platform.joining import joining
from cherry_megatron.platform.leaving import end_on_user_signal
from cherry_megatron.platform.machine import Machine
from cherry_megatron.platform.reading import read_by
from cherry_megatron.platform.rotation import rotate_by
from cherry_megatron.platform.saving import around_each_save
from cherry_megatron.platform.steps import around_each_step
from cherry_megatron.runs import make_run_folder, only_training, record_start
from cherry_megatron.sgt.loss import Supervision


def pretrain(
    config: Config,
    machine: Machine,
    extra: dict[str, Any] | None = None,
    show_all: bool = False,
    evaluation: Callable[..., Any] = LoopEvaluation,
) -> Any:
    """Train until --train-iters, resuming the run's newest checkpoint if it has one.

    Args:
        config: the resolved configuration.
        machine: from `prepare()`, which must have been called.
        extra: further Megatron flags of the caller, e.g. skip-train.
        show_all: show Megatron's own output too.
        evaluation: makes what is called with the model at each evaluation, from the configuration, the progress and
            `run_micro_batch`.

    Returns:
        What `evaluation` made.
    """
    require(machine, config, training=not (extra or {}).get("skip-train"))
    end_on_user_signal()
    terminal = sys.stdout
    with Console() as console:
        args = initialize(config, machine, extra or {})
        make_run_folder(config)
        console.write_to(config.run / "logs" / f"rank{args.rank}.log", also=terminal if show_all else None)
        return _pretrain(config, args, terminal, evaluation)


def load_only(config: Config) -> dict[str, Any]:
    """Flags to load weights and call `evaluation` without training.

    Megatron evaluates before it does so: on as little as it can.
    """
    ranks = config.value("tensor-model-parallel-size") * config.value("pipeline-model-parallel-size")
    copies = max(int(os.environ["WORLD_SIZE"]) // ranks, 1)
    little = {"eval-iters": 1, "eval-micro-batch-size": 1, "eval-global-batch-size": copies}
    # No events either: nothing is learned, and their writer tells of a full disk by a traceback.
    return {"skip-train": True, "no-load-optim": True, "no-load-rng": True, "tensorboard-dir": None, **little}


def _pretrain(config: Config, args: Any, terminal: TextIO, make_evaluation: Callable[..., Any]) -> Any:
    flops = training_flops(config.recurrence, config.shape, args.seq_length, config.moee, config.mtp.depths)
    progress = Progress(config.run, args, flops, terminal)
    objective = Objective()
    evaluation = make_evaluation(config, progress, objective.run_micro_batch)
    loading = Loading(config, args, progress.say, progress.keep_alarm)
    read_by(loader_of(config))
    build = model_provider(config)
    around: AroundStep | None = None

    def model(*given: Any, **named: Any) -> torch.nn.Module:
        if around is not None:
            around.starts("building and loading the model")
        return build(*given, **named)

    def datasets(samples: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        loading.done()
        if around is not None:
            around.starts("building the data sets")
        if args.rank == 0 and not args.skip_train:
            progress.say(where_from(config, args))
        reading: dict[str, Any] = {"selection": config.sgt and config.sgt.marks, "shuffle": config.data.shuffle}
        reading["context"] = config.prefix
        train, valid, _ = build_datasets(samples, **reading)
        held_out = build_held_out(config.evaluation.batches * args.eval_global_batch_size, **reading)
        progress.train_dataset, progress.held_out = train, held_out
        # Both need Megatron's process groups.
        if config.distillation is not None and not args.skip_train:
            objective.teacher = Teacher(config.distillation, config, args)
        if config.sgt is not None:
            objective.supervision = Supervision(config.sgt, None if args.skip_train else train)
        if args.rank == 0 and not args.skip_train:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            share = objective.supervision.share if objective.supervision else None
            record_start(config, args.world_size, device, share)
        if around is not None:
            around.started()
        # Megatron would report the test split under the validation's tags.
        return train, valid, None

    datasets.is_distributed = True  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        if not args.skip_train:
            stack.enter_context(only_training(config, args.rank))
            unchanged_start(config, args)
            keeping = stack.enter_context(Keeping(config, args, progress.say))
            around_each_save(keeping.saves)
            around = AroundStep(config, objective, progress, evaluation, args)
            stack.callback(around.close)
            around_each_step(around)
            stack.enter_context(board(config, args, torch.cuda.is_available()))
        stack.enter_context(progress)
        stack.enter_context(loading)
        stack.enter_context(joining(config.source))
        megatron_pretrain(
            pretrain_cfg_container_from_args(args),
            datasets,
            ModelType.encoder_or_decoder,
            objective.forward_step,
            model,
            non_loss_data_func=evaluation,
        )
    return evaluation


def loader_of(config: Config) -> Callable[..., Any] | None:
    """What reads by torch's DataLoader or in its place, see platform/reading.py."""
    if config.data.loader == "torch":
        return None
    from cherry_megatron.data.dali import DaliLoader  # imports DALI

    return DaliLoader


def initialize(config: Config, machine: Machine, extra: dict[str, Any]) -> Any:
    """Hand the configuration to Megatron as its own command line.

    Returns:
        Megatron's arguments.

    Raises:
        CherryError: what Megatron's validation says of them, or that ranks are missing for the experts.
    """
    expert, world = config.value("expert-model-parallel-size"), int(os.environ["WORLD_SIZE"])
    within = config.value("expert-tensor-parallel-size") or config.value("tensor-model-parallel-size")
    ranks = within * expert * config.value("pipeline-model-parallel-size")
    if expert > 1 and world % ranks:  # Megatron would see it when the run's folder is made
        raise CherryError(
            f"{config.source}: {world} processes cannot hold experts cut in {within} on each of "
            f"expert-model-parallel-size {expert} in each pipeline stage; start a multiple of {ranks} processes, "
            "or set it to 1"
        )
    run = config.run.absolute()
    values = {
        **machine.flags,
        **config.megatron,
        "hybrid-layer-pattern": config.plan().megatron_pattern,
        "save": str(run / "checkpoints"),
        "tensorboard-dir": str(run / "tensorboard"),
        **start_from(config),
        **({"num-experts": config.moee.experts} if config.moee else {}),
        **({"mtp-loss-scaling-factor": config.mtp.weight} if config.mtp.depths else {}),
        "data-cache-path": config.megatron.get("data-cache-path", str(run / "cache")),
        **extra,
    }
    sys.argv = ["cherry", *megatron_arguments(values), *config.flags]
    try:
        args = parse_and_validate_args()
    except OSError as error:  # it makes the folder of TensorBoard
        raise cannot_write(config.run, error) from None
    except (AssertionError, ValueError) as error:
        # Some of its checks say nothing; the line that failed does.
        says = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise CherryError(f"{config.source}: Megatron refuses these flags: {says}") from None
    rotate_by(rotate_qkv)
    # Copies of the core on several stages are one layer: what a checkpoint records must not change.
    args.num_layers = len(config.recurrence.parsed.symbols)
    if config.has_experts:
        # The load-balancing loss is LoopRouter's own, and so is its report.
        args.moe_router_load_balancing_type = "none"
    if config.moee is not None:
        # Megatron makes the expert-parallel groups; of experts it knows those inside layers, and of hybrid models
        # those that are one.
        args.num_experts = args.moe_ffn_hidden_size = args.hybrid_layer_pattern = None
    args.async_save = bool(config.value("async-save"))  # which Megatron drops without a worker process
    return args


def model_provider(cherry: Config) -> Callable[..., torch.nn.Module]:
    """Megatron's model provider for a configuration."""

    def provide(
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> torch.nn.Module:
        args = get_args()
        build: Callable[..., torch.nn.Module] = build_model
        one = args
        if cherry.moee is not None:
            build, one = partial(build_mixture, cherry.moee), copy.copy(args)
            # An expert is a hybrid model and lies whole on its tensor-parallel ranks.
            one.expert_model_parallel_size, one.hybrid_layer_pattern = 1, cherry.plan().megatron_pattern
        transformer = prepare_config(core_transformer_config_from_args(one), cherry.recurrence)
        return build(
            transformer,
            cherry.recurrence,
            cherry.shape,
            cherry.plan(),
            pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
            sequence_length=args.max_position_embeddings,
            rotary_base=args.rotary_base,
            seed=args.seed,
            pre_process=pre_process,
            post_process=post_process,
        )

    return provide
