"""Names of layers with experts, and when an expert inside a layer counts as left out."""

from cherry_megatron.model.pattern import parse
from cherry_megatron.monitor.experts import expert_layers
from cherry_megatron.monitor.mixture import MixtureWatch


def test_layers_are_counted_from_one():
    assert expert_layers(parse("*E[*-*E]x2*EE")) == {1: "layer-1", 5: "layer-3", 7: "layer-4", 8: "layer-4b"}


def heard(means, *walks):
    """What is reported of a layer, and once an interval of its loops."""
    tags = {f"cherry/moee/load/layer-2/{e}": load for e, load in enumerate(means)} | {
        "cherry/moee/gate-entropy/layer-2": 0.5
    }
    for n, walk in enumerate(walks, 1):
        tags |= {f"cherry/moee/load/layer-2/loop-{n}/{e}": load for e, load in enumerate(walk)}
    return tags


def test_an_expert_that_one_loop_wants_is_in_use():
    watch = MixtureWatch()
    watch.step_ended(heard([0.5, 0.75, 0.75], [0.0, 1.0, 1.0], [1.0, 0.5, 0.5]))
    assert watch.alarms() == []


def test_an_expert_with_next_to_no_token_in_every_step_is_left_out():
    """Top 2 of 3: an even share of the tokens is two thirds."""
    watch = MixtureWatch()
    watch.step_ended(heard([0.04, 0.96, 1.0]))
    watch.step_ended(heard([0.02, 0.98, 1.0], [0.02, 0.98, 1.0], [0.02, 0.98, 1.0]))
    (line,) = watch.alarms()
    assert line == (
        "expert 0 of layer-2 is left out: sees 4.0% of the tokens at most, in each of the last 2 steps; raise "
        "megatron.moe-aux-loss-coeff"
    )
    watch.step_ended(heard([0.04, 0.96, 1.0]))
    watch.step_ended(heard([0.2, 0.8, 1.0]))
    assert watch.alarms() == []
