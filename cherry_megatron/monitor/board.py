"""The page that TensorBoard shows of a run: charts by subject, settings, arguments, pictures.

All of it is written through Megatron's own writer, so it lies in the run's one file of events.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from megatron.training import get_tensorboard_writer
from torch.utils.tensorboard.summary import hparams

from cherry_megatron.config import Config
from cherry_megatron.monitor.accounting import account, together
from cherry_megatron.monitor.tags import HELD_OUT, MOEE, MTP, OURS

_NUMBER, _WORDS = r"[0-9]+", r"[^/]+"
Chart = tuple[str, ...]  # what the tags of its curves look like, from their first letter to their last
# What runs are compared by, and what stands for a run without it. TensorBoard takes the list of them from any one
# of the runs that it shows, so all runs have all, of one type each.
_SETTINGS: dict[str, str | int | float] = {
    "recurrence.pattern": "", "recurrence.loops": 1, "recurrence.order": "cycle", "recurrence.loop_scales": False,
    "recurrence.loop_rank": 0, "recurrence.injection": "none", "distillation.weight": 0.0, "mtp.depths": 0,
    "data.shuffle": "none", "sgt.marks": "none", "sgt.top_loss": 0.0, "sgt.alpha": 0.0, "moee.experts": 0,
    "moee.top_k": 0, "moee.balance": 0.0,
}  # fmt: skip
_FLAGS: dict[str, str | int | float] = {
    "hidden-size": 0, "seq-length": 0, "num-experts": 0, "global-batch-size": 0, "train-iters": 0, "lr": 0.0,
    "min-lr": 0.0, "lr-warmup-iters": 0, "weight-decay": 0.0, "init-method-std": 0.0, "seed": 0, "bf16": False,
    "fp8-format": "none",
}  # fmt: skip


def charts(config: Config, ranks: int, on_gpu: bool) -> dict[str, dict[str, Chart]]:
    """Category -> title of a chart -> its curves; what a run of this configuration does not write is left out.

    TensorBoard shows several runs together: charts that they have in common have the curves of all.

    Args:
        config: of the run.
        ranks: of the training.
        on_gpu: whether it runs on GPUs.
    """
    page = {
        "Training": _training(config),
        "SGT": _selective(config),
        "Recurrence": _recurrence(config),
        "MoEE": _experts(config),
        "Speed": _speed(ranks, on_gpu),
        "Health": _health(config),
    }
    return {category: found for category, found in page.items() if found}


def _training(config: Config) -> dict[str, Chart]:
    found: dict[str, Chart] = {
        "loss, nats a token": ("lm loss", "lm loss validation"),
        "held-out loss, all loops": (HELD_OUT,),
        "gradient norm": ("grad-norm",),
        "learning rate": ("learning-rate",),
    }
    if config.distillation is not None:
        found["divergence from the teacher"] = ("divergence from teacher",)
    if config.mtp.depths:
        found["multi-token prediction: loss by depth"] = (f"{MTP}loss/{_NUMBER}", f"{MTP}loss/{_NUMBER}/held-out")
        found["multi-token prediction: accepted share"] = (f"{MTP}acceptance/.+",)
    return found


def _selective(config: Config) -> dict[str, Chart]:
    if config.sgt is None:
        return {}
    found: dict[str, Chart] = {"training loss by part": ("(selected|unselected|weighted) loss",)}
    if config.sgt.marks:  # held-out text has marks too
        found["held-out loss by part"] = (f"{OURS}sgt/held-out-loss/(selected|unselected)",)
    if config.sgt.probe_interval:
        found["gradient coupling: cos"] = (f"{OURS}sgt/cos/.+",)
        found["gradient coupling: ratio"] = (f"{OURS}sgt/ratio/.+",)
    return found


def _recurrence(config: Config) -> dict[str, Chart]:
    if config.recurrence.loops == 1:
        return {}
    return {
        "held-out loss by number of loops": (f"{OURS}loss-by-loops/{_NUMBER}",),
        "size of the state after each loop": (f"{OURS}residual-norm/loop-{_NUMBER}",),
        "relative change of the state in each loop": (f"{OURS}relative-change/loop-{_NUMBER}",),
        "likeness of tokens after each loop": (f"{OURS}token-correlation/loop-{_NUMBER}",),
    }


def _experts(config: Config) -> dict[str, Chart]:
    if config.has_experts:
        return {
            "load of each expert": (f"{MOEE}load/{_WORDS}/{_NUMBER}",),
            "entropy of the gates, nats": (f"{MOEE}gate-entropy/{_WORDS}",),
            "load-balancing loss": ("balance loss",),
        }
    if config.moee is None:
        return {}
    found: dict[str, Chart] = {
        "load of each expert": (f"{MOEE}load/{_NUMBER}",),
        "share of the tokens that each explains": (f"{MOEE}responsibility/{_NUMBER}",),
        "share of the sequences that would choose each": (f"{MOEE}wanted/{_NUMBER}",),
        "held-out loss of each expert": (f"{MOEE}loss/{_NUMBER}/held-out",),
        "entropy of the gates, nats": (f"{MOEE}gate-entropy",),
        "drift of the router between evaluations": (f"{MOEE}(router-drift|changed-choices)/held-out",),
    }
    return found | ({"load-balancing loss": ("balance loss",)} if config.moee.routes else {})


def _speed(ranks: int, on_gpu: bool) -> dict[str, Chart]:
    start = f"{OURS}throughput/"
    found: dict[str, Chart] = {
        "tokens a second": (f"{start}tokens-per-second",),
        "seconds a step": (f"{start}seconds-per-step",),
        "TFLOP/s a device": (f"{start}tflops-per-device",),
    }
    if on_gpu:
        found["model FLOPs utilization"] = (f"{start}mfu",)
    if ranks > 1:
        found["seconds that ranks compute in a step"] = (f"{OURS}ranks/(median|slowest)-seconds",)
    return found


def _health(config: Config) -> dict[str, Chart]:
    found: dict[str, Chart] = {"alarms so far": (f"{OURS}alarms/so-far",)}
    if config.generation is not None:
        start = f"{OURS}generation/"
        found["generated texts: variety and repetition"] = (f"{start}(distinct-{_NUMBER}|repetition)",)
        found["generated texts: share that ended"] = (f"{start}ended",)
        found["generated texts: tokens"] = (f"{start}length",)
    return found


def settings(config: Config) -> dict[str, str | int | float]:
    """What TensorBoard compares runs by, the same of every run: keys of the configuration, flags, sizes."""
    resolved = config.as_dict()
    said = {key: _within(resolved, key) for key in _SETTINGS} | {flag: config.value(flag) for flag in _FLAGS}
    found = {key: none if said[key] is None else said[key] for key, none in (_SETTINGS | _FLAGS).items()}
    model = together(
        account(config.recurrence, config.shape, config.positive("seq-length"), config.moee, config.mtp.depths)
    )
    return found | {
        "parameters": model.stored, "active parameters": model.active, "GFLOP a token": model.flops / 1e9
    }  # fmt: skip


def _within(resolved: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return resolved.get(section, {}).get(name)


@contextmanager
def board(config: Config, args: Any, on_gpu: bool) -> Iterator[None]:
    """Lay out a training's page, and say at its end that it came to its end.

    Only the rank that has Megatron's writer, the last one, does something.

    Args:
        config: of the run.
        args: Megatron's arguments.
        on_gpu: whether it runs on GPUs.
    """
    writer = get_tensorboard_writer()
    if writer is None:
        yield
        return
    page = charts(config, args.world_size, on_gpu)
    # TensorBoard looks for a match at a tag's beginning.
    writer.add_custom_scalars(
        {
            category: {title: ["Multiline", [f"{curve}$" for curve in curves]] for title, curves in found.items()}
            for category, found in page.items()
        }
    )
    measured = (HELD_OUT, "lm loss", f"{OURS}throughput/tokens-per-second")
    experiment, begin, end = hparams(settings(config), dict.fromkeys(measured, 0))
    for summary in (experiment, begin):  # add_hparams would make a run of its own of them
        writer.file_writer.add_summary(summary)
    writer.add_text(f"{OURS}run/configuration", _as_it_is(yaml.safe_dump(config.as_dict(), sort_keys=False)))
    writer.add_text(
        f"{OURS}run/arguments", _as_it_is("\n".join(f"{k}: {v}" for k, v in sorted(vars(args).items())))
    )
    yield
    writer.file_writer.add_summary(end)
    writer.flush()


def _as_it_is(text: str) -> str:
    """A text in which nothing is Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())
