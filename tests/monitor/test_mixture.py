"""What is kept of a mixture's reports, when an expert counts as left out, how far a router has moved."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.monitor.mixture import MixtureWatch
from tests.conftest import run_ranks


def heard(responsibility, wanted):
    tags = {f"cherry/moee/responsibility/{e}": value for e, value in enumerate(responsibility)}
    tags |= {f"cherry/moee/wanted/{e}": value for e, value in enumerate(wanted)}
    tags |= {"cherry/moee/loss/0": math.nan, "cherry/moee/gate-entropy validation": 0.6}
    return {"lm loss": 3.0, **tags, "cherry/moee/wanted/0/held-out": 0.0, "cherry/moee/wanted/1/held-out": 1.0}


def test_a_step_keeps_the_mixtures_own_values_and_no_mean_over_nothing():
    found = MixtureWatch().step_ended(heard([0.25, 0.75], [1.0]))
    assert found == {"moee": {"responsibility/0": 0.25, "responsibility/1": 0.75, "wanted/0": 1.0}}


def test_a_single_model_has_neither_values_nor_alarms():
    watch = MixtureWatch()
    assert watch.step_ended({"lm loss": 3.0}) == {}
    assert watch.alarms() == []


def test_an_expert_is_left_out_if_it_has_next_to_nothing_in_every_step():
    watch = MixtureWatch()
    for shares in ([0.0, 0.04, 0.96], [0.02, 0.0, 0.98]):
        watch.step_ended(heard(shares, [0.5, 0.7, 0.8]))
    (line,) = watch.alarms()
    assert line.startswith(
        "expert 0 is left out: responsible for 2.0% of the tokens at most, in each of the last 2"
    )
    watch.step_ended(heard([0.1, 0.1, 0.8], [0.5, 0.7, 0.8]))
    assert watch.alarms() == []


def test_an_expert_that_only_capacity_feeds_is_left_out():
    """Top 2 of 3: an even share of the sequences is two thirds."""
    watch = MixtureWatch()
    for wanted in ([0.0, 1.0, 1.0], [0.07, 0.93, 1.0]):
        watch.step_ended(heard([0.3, 0.3, 0.4], wanted))
    watch.step_ended(heard([0.3, 0.3, 0.4], [0.06, 0.94, 1.0]))
    assert watch.alarms() == []
    watch.step_ended(heard([0.3, 0.3, 0.4], [0.06, 0.94, 1.0]))
    (line,) = watch.alarms()
    assert line.startswith("expert 0 is left out: wanted by 6.0% of the sequences at most, in each of the last 1")


def test_a_step_without_shares_is_left_out():
    """Without a token with a loss responsibilities are means over nothing."""
    watch, nothing = MixtureWatch(), [math.nan] * 3
    watch.step_ended(heard(nothing, [0.5, 0.7, 0.8]))
    assert watch.alarms() == []
    for shares in ([0.0, 0.04, 0.96], nothing):
        watch.step_ended(heard(shares, [0.5, 0.7, 0.8]))
    (line,) = watch.alarms()
    assert line.startswith(
        "expert 0 is left out: responsible for 0.0% of the tokens at most, in each of the last 1"
    )


@given(st.data())
def test_divergence_of_gates(data):
    """Against the definition; not negative, and zero of what stands still."""
    import torch

    from cherry_megatron.monitor.mixture import divergence

    experts, tokens = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    row = st.lists(st.floats(-5, 5), min_size=experts, max_size=experts)
    before, now = (
        torch.tensor(data.draw(st.lists(row, min_size=tokens, max_size=tokens)), dtype=torch.float64).log_softmax(
            -1
        )
        for _ in range(2)
    )
    by_hand = [
        sum(math.exp(p) * (p - q) for p, q in zip(ps, qs, strict=True))
        for ps, qs in zip(before.tolist(), now.tolist(), strict=True)
    ]
    found = float(divergence(before, now))
    assert found == pytest.approx(sum(by_hand) / tokens, abs=1e-12)
    assert found >= -1e-12
    assert float(divergence(before, before)) == 0


BEFORE, NOW = [[0.9, 0.1], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]


def drift():
    """What is said of three evaluations: the first one, the gates of another router, and these again."""
    import torch

    from cherry_megatron.model.options import Mixture
    from cherry_megatron.monitor.mixture import RouterDrift
    from tests.model.test_mixture import build

    build(Mixture(experts=2))
    router, found = RouterDrift(), []
    for gates, wanted in ((BEFORE, [[1, 0], [1, 0]]), (NOW, [[0, 1], [1, 0]]), (NOW, [[0, 1], [1, 0]])):
        seen = SimpleNamespace(gates=torch.tensor(gates).log().cuda(), wanted=torch.tensor(wanted).bool().cuda())
        found.append(router.since_last(SimpleNamespace(seen=seen)))
    return found


def test_a_router_has_moved_since_the_evaluation_before(tmp_path: Path):
    """KL(before || now), not the other way round."""
    ((first, moved, still),) = run_ranks(tmp_path, 1, drift)
    assert first == {}
    assert moved == {
        "cherry/moee/router-drift": pytest.approx((0.9 * math.log(1.5) + 0.1 * math.log(0.25)) / 2, rel=1e-5),
        "cherry/moee/changed-choices": 0.5,
    }
    assert still == {"cherry/moee/router-drift": 0, "cherry/moee/changed-choices": 0}
