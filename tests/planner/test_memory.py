"""Bytes against those of real tensors, where a CPU has them, and what can only grow or shrink."""

from dataclasses import replace
from pathlib import Path

import pytest

from cherry_megatron.model.options import Recurrence
from cherry_megatron.monitor.accounting import layout_of
from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.planner.job import Setting, job_of, setting_of
from cherry_megatron.planner.memory import needed, peak, room
from tests.conftest import run_ranks
from tests.planner.conftest import DERIVED

H100 = read("h100", DERIVED)
HIDDEN, INNER, TOKENS = 32, 48, 2 * 16  # of tests/model/test_stack.py's model


def bytes_of_a_training(path: Path, overrides: list[str]) -> tuple[dict[str, int], dict[str, float]]:
    """This rank's weights, gradients and optimizer state after a training, and what is predicted of them."""
    import os

    from megatron.training import training

    from cherry_megatron.cli import main
    from cherry_megatron.config import load

    made = []
    original = training.setup_model_and_optimizer

    def kept(*values, **named):
        made.append(original(*values, **named))
        return made[-1]

    training.setup_model_and_optimizer = kept
    assert main(["pretrain", "--config", str(path), *(t for o in overrides for t in ("--set", o))]) == 0
    ((model, optimizer, _),) = made
    parameters = [p for chunk in model for p in chunk.parameters()]
    states = [value for one in optimizer.chained_optimizers for value in one.optimizer.state.values()]
    found = {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters),
        "optimizer": sum(t.nbytes for state in states for t in state.values() if t.dim()),
    }
    config, world = load(path, overrides), int(os.environ["WORLD_SIZE"])
    stage = int(os.environ["RANK"]) // (world // config.value("pipeline-model-parallel-size"))
    return found, needed(job_of(config), setting_of(config, world), H100)[stage]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["recurrence.loop_scales=true"]),
        (2, []),
        (2, ["megatron.tensor-model-parallel-size=2", "megatron.sequence-parallel=true"]),
        (2, ["megatron.pipeline-model-parallel-size=2"]),
        (4, ["megatron.num-distributed-optimizer-instances=2", "megatron.overlap-param-gather=false"]),
    ],
)
def test_weights_gradients_and_optimizer_are_a_real_trainings(ranks, overrides, tmp_path: Path, write_config):
    path = write_config(tmp_path, megatron={"train-iters": 1, "lr-warmup-iters": 0})
    overrides = ["recurrence.loop_scales=false", *overrides]
    both = run_ranks(tmp_path, ranks, bytes_of_a_training, path, overrides)
    for found, predicted in both:
        assert found["weights"] == predicted["weights"]
        assert found["gradients"] == predicted["gradients"]
    # Ranks of one stage share out the state, not evenly to the byte.
    assert sum(found["optimizer"] for found, _ in both) == sum(predicted["optimizer"] for _, predicted in both)


@pytest.mark.parametrize("instances", [1, 2, 4])
def test_a_configurations_own_setting_is_the_layout_of_cherry_params(instances, job):
    made = job(
        "cherry_227m",
        "megatron.overlap-param-gather=false",
        f"megatron.num-distributed-optimizer-instances={instances}",
    )
    found = made.layout(setting_of(made.config, 4))
    assert found == layout_of(made.config, 4)
    assert found.shards(mixture=False)[0] == 4 // instances


def values_kept(recurrence: Recurrence, recompute: bool) -> float:
    """Values a token that a real forward pass keeps for the backward pass, parameters left out."""
    import torch

    from tests.model.test_stack import build

    model, _, tokens = build(recurrence, recompute)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[:2] == (16, 2):
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or another might get its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(model(tokens, torch.arange(16).expand(2, -1), None))
    return sum(seen.values()) / 4 / TOKENS


def a_further_loop(pattern: str, recompute: bool, **options) -> float:
    """What one more walk of the core keeps."""
    two, three = (values_kept(Recurrence(pattern.format(n), **options), recompute) for n in (2, 3))
    return three - two


def loops_of_models() -> dict[str, float]:
    return {
        "MLP": a_further_loop("-[-]x{}-", False),
        "MLP with vectors": a_further_loop("-[-]x{}-", False, loop_scales=True),
        "recomputed MLP": a_further_loop("-[-]x{}-", True),
        "recomputed layers": a_further_loop("*-[*-*-]x{}*-", True),
    }


def predicted_loop(job, pattern: str, recompute: bool, **options: object) -> float:
    """The same by the model, values a token, of layers as wide."""
    sizes = [f"hidden-size={HIDDEN}", f"ffn-hidden-size={INNER}", "num-attention-heads=4", "seq-length=16"]
    given = [f"megatron.{size}" for size in (*sizes, "bf16=false", "padded-vocab-size=64")]
    given += [f"recurrence.{key}={value}" for key, value in options.items()]
    kept = []
    for loops in (2, 3):
        made = job("cherry_227m", *given, f"recurrence.pattern={pattern.format(loops)}", batch=2)
        (stage,) = needed(made, Setting(micro_batch=2, recompute=recompute), H100)
        kept.append(stage["activations"] / 4 / TOKENS)
    return kept[1] - kept[0]


def test_what_a_loop_keeps_is_what_autograd_keeps(tmp_path: Path, job):
    """Local layers do not fuse the activation, which costs two more of the inner width."""
    (found,) = run_ranks(tmp_path, 1, loops_of_models)
    mlp = predicted_loop(job, "-[-]x{}-", False)
    assert mlp == 2 * HIDDEN + 3 * INNER
    assert found["MLP"] == mlp + 2 * INNER
    assert found["MLP with vectors"] == predicted_loop(job, "-[-]x{}-", False, loop_scales="true") + 2 * INNER
    assert found["recomputed MLP"] == predicted_loop(job, "-[-]x{}-", True) == HIDDEN
    assert found["recomputed layers"] == predicted_loop(job, "*-[*-*-]x{}*-", True) == HIDDEN


def test_what_can_only_grow(job):
    given = job("base_1b", batch=64)

    def bytes_of(setting: Setting) -> float:
        return peak(needed(given, setting, H100))

    sizes = [bytes_of(Setting(micro_batch=micro)) for micro in (1, 2, 4)]
    assert sizes == sorted(sizes)
    assert bytes_of(Setting(micro_batch=4, recompute=True)) < sizes[-1] / 2
    for more in ({"tensor": 2}, {"pipeline": 2}, {"data": 2}):
        assert bytes_of(Setting(micro_batch=4, **more)) < sizes[-1]
    deeper = job("cherry_227m", "recurrence.loops=4", batch=64), job("cherry_227m", batch=64)
    less, all_ = (needed(each, Setting(micro_batch=4), H100)[0] for each in deeper)
    assert less["weights"] == all_["weights"] and less["activations"] < all_["activations"]


def test_loops_without_a_gradient_keep_nothing(job):
    cut = job("cherry_227m", "recurrence.injection=add", "recurrence.backprop_loops=2", batch=8)
    two = job("cherry_227m", "recurrence.loops=2", batch=8)
    kept = [needed(each, Setting(micro_batch=2), H100)[0]["activations"] for each in (cut, two)]
    assert kept[0] == kept[1]


def test_an_expert_may_have_to_walk_everyones_sequences(job):
    given = job("cherry_1p8b", batch=64)
    of_eight = peak(needed(given, Setting(expert=8, data=8, micro_batch=1), H100))
    everyone = peak(needed(replace(given, mixture=None), Setting(data=8, micro_batch=8), H100))
    assert of_eight == pytest.approx(everyone, rel=0.05)
    assert of_eight < room(GPUS["h100"], H100)
