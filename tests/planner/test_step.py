"""The time of a step: FLOPs as the accounting has them, divisions by hand, and what can only grow or shrink."""

from dataclasses import replace

import pytest

from cherry_megatron.monitor.accounting import account, held_parameters, training_flops
from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.planner.job import Setting
from cherry_megatron.planner.rates import Rates
from cherry_megatron.planner.step import predict, rows_of
from tests.planner.conftest import DERIVED

H100 = Rates(GPUS["h100"], read("h100", DERIVED))
PEAK = 989e12


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("cherry_227m", ()),
        ("dense_566m", ()),
        ("cherry_227m", ("recurrence.loops=2", "mtp.depths=2")),
        ("cherry_227m", ("recurrence.loop_rank=4",)),
        ("cherry_227m", ("megatron.group-query-attention=true", "megatron.num-query-groups=2")),
        ("cherry_1p8b", ("moee.top_k=0",)),
        ("layers_227m", ()),
    ],
)
def test_products_and_attention_are_the_flops_of_the_accounting(name, overrides, ideal, job):
    """An independent count: `cherry params`."""
    given = job(name, *overrides, batch=8)
    step = predict(given, Setting(micro_batch=8), ideal)
    flops = (
        training_flops(given.recurrence, given.shape, given.sequence, given.mixture, given.depths) * given.tokens
    )
    if given.mixture is not None:  # the router is left out
        (router,) = [part for part in _rows(given) if part.name == "router"]
        flops -= router.flops * given.tokens
    assert (step.parts["matrix products"] + step.parts["attention"]) * PEAK == pytest.approx(flops, rel=1e-9)
    others = {name: seconds for name, seconds in step.parts.items() if name not in ("matrix products", "attention")}
    assert sum(others.values()) == pytest.approx(0, abs=1e-9)


def _rows(given):
    return account(given.recurrence, given.shape, given.sequence, given.mixture, given.depths)


def test_tensor_ranks_share_products_and_data_ranks_sequences(ideal, job):
    given = job("dense_566m", batch=8)
    alone = predict(given, Setting(micro_batch=2), ideal).seconds
    assert predict(given, Setting(tensor=2, micro_batch=2), ideal).seconds == pytest.approx(alone / 2)
    assert predict(given, Setting(data=4, micro_batch=2), ideal).seconds == pytest.approx(alone / 4)


def test_recomputation_is_one_more_forward_pass(ideal, job):
    given = job("cherry_227m", batch=8)
    plain, again = (predict(given, Setting(micro_batch=8, recompute=on), ideal) for on in (False, True))
    head = 3 * 2 * given.shape.vocabulary_weights * given.tokens / PEAK
    # A third of the layers' products; the head is not recomputed.
    assert again.parts["matrix products"] - head == pytest.approx(4 / 3 * (plain.parts["matrix products"] - head))


def test_a_pipeline_of_equal_stages_has_the_known_bubble(ideal, job):
    """(stages - 1) / micro-batches of the work (Narayanan et al. 2021)."""
    given = job("base_1b", "megatron.padded-vocab-size=8", batch=16)
    step = predict(given, Setting(pipeline=4, micro_batch=2), ideal)
    work = sum(step.parts.values()) - step.parts["pipeline bubble"]
    assert step.parts["pipeline bubble"] == pytest.approx(work * 3 / 8, rel=1e-3)


def test_a_looped_core_is_exchanged_when_the_pass_is_over(ideal, job):
    """Gradients in float32 and weights in BF16 over two ranks; those of coda and head lie beside the passes."""
    rates = Rates(replace(ideal.gpu, link=1e9), ideal.measured)
    step = predict(job("cherry_227m", batch=2), Setting(data=2, micro_batch=1), rates)
    layer, words = 4 * 1280**2 + 3 * 1280 * 3200, 1280 * 44544
    stored = 6 * (layer + 2 * 1280) + 2 * words + 1280
    late = (5 * layer + words) / (6 * layer + 2 * words)
    seconds = stored * (4 + 2) / 2 / 1e9
    busy = step.parts["matrix products"] + step.parts["attention"]
    hidden = min(stored * 2 * (1 - late) / 1e9, busy * 2 / 3) + min(stored * (1 - late) / 1e9, busy / 3)
    assert step.parts["gradients and weights"] == pytest.approx(seconds - hidden, rel=0.02)
    without = predict(job("cherry_227m", "megatron.overlap-grad-reduce=false", batch=2), Setting(data=2), rates)
    assert without.parts["gradients and weights"] == pytest.approx(seconds, rel=1e-6)


def test_instances_of_the_optimizer_sum_their_shares(ideal, job):
    """Two of two ranks: gradients over an instance, half of them over both, weights over an instance."""
    rates = Rates(replace(ideal.gpu, link=1e9, bandwidth=1e12), ideal.measured)
    options = ("megatron.overlap-grad-reduce=false", "megatron.overlap-param-gather=false")
    setting = Setting(data=4)
    one, two, four = (
        predict(
            job("cherry_227m", *options, f"megatron.num-distributed-optimizer-instances={n}", batch=4),
            setting,
            rates,
        )
        for n in (1, 2, 4)
    )
    stored = 6 * (4 * 1280**2 + 3 * 1280 * 3200 + 2 * 1280) + 2 * 1280 * 44544 + 1280
    exchanged = {1: 3 / 4 * 4 + 3 / 4 * 2, 2: 1 / 2 * 4 + 1 / 2 * 2 * 1 / 2 * 4 + 1 / 2 * 2, 4: 2 * 3 / 4 * 4}
    for found, (instances, each) in zip((one, two, four), exchanged.items(), strict=True):
        assert found.parts["gradients and weights"] == pytest.approx(stored * each / 1e9)
        assert found.parts["optimizer"] == pytest.approx(stored * (40 * instances / 4 + 4) / 1e12)


def test_state_of_experts_inside_layers_lies_on_fewer_ranks(ideal, job):
    """Eight ranks with an eighth of the experts each: the state of these is shared out over nobody."""
    rates = Rates(replace(ideal.gpu, bandwidth=1e12), ideal.measured)
    given, setting = job("layers_227m", batch=8), Setting(data=8, expert=8)
    rest, experts = held_parameters(
        given.plan(1), given.shape, given.layout(setting), given.recurrence, given.mixture, 0
    )
    seconds = (40 * (rest / 8 + experts) + 4 * (rest + experts)) / 1e12
    assert experts > rest / 8 and predict(given, setting, rates).parts["optimizer"] == pytest.approx(seconds)


def test_python_waits_or_is_waited_for(ideal, job):
    given = job("cherry_227m", batch=8)
    slow = Rates(ideal.gpu, replace(ideal.measured, host_forward=1e-2, host_backward=2e-2))
    eager = predict(given, Setting(micro_batch=4), slow)
    assert eager.seconds == pytest.approx(2 * 68 * 3e-2, rel=1e-3)
    graph = predict(given, Setting(micro_batch=4, graph=True), slow)
    assert graph.seconds == pytest.approx(predict(given, Setting(micro_batch=4), ideal).seconds)


def test_the_busiest_of_the_experts_ranks_sets_the_pace(job):
    given = job("cherry_1p8b", batch=64)
    assert rows_of(given, Setting(expert=1, data=8, micro_batch=4)) == 1  # 4 x 2 / 8
    alone = rows_of(given, Setting(expert=8, data=8, micro_batch=4))
    assert 8 < alone <= 32  # its even share, and all there are
    forced = job("cherry_1p8b", "megatron.moe-router-force-load-balancing=true", batch=64)
    assert rows_of(forced, Setting(expert=8, data=8, micro_batch=4)) == 8
    everyone = job("cherry_1p8b", "moee.top_k=0", batch=64)
    assert rows_of(everyone, Setting(expert=8, data=8, micro_batch=4)) == 32


@pytest.mark.parametrize("name", ["cherry_227m", "dense_566m", "layers_227m"])
def test_what_can_only_grow(name, job):
    given = job(name, batch=64)
    base = Setting(micro_batch=4)
    seconds = predict(given, base, H100).seconds
    assert predict(job(name, batch=128), base, H100).seconds > 1.9 * seconds
    assert predict(given, replace(base, recompute=True), H100).seconds > seconds
    assert predict(given, replace(base, graph=True), H100).seconds < seconds
    assert predict(given, replace(base, micro_batch=1), H100).seconds > seconds
    times = [predict(given, replace(base, data=ranks, micro_batch=1), H100).seconds for ranks in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    speed = [time * ranks for time, ranks in zip(times, (1, 2, 4, 8), strict=True)]
    assert speed == sorted(speed)  # GPU time only grows
    slower = replace(H100.measured, stream=H100.measured.stream / 2)
    assert predict(given, base, Rates(H100.gpu, slower)).seconds > seconds


def test_more_loops_take_longer(job):
    times = [
        predict(job("cherry_227m", f"recurrence.loops={loops}", batch=8), Setting(micro_batch=8), H100).seconds
        for loops in (1, 2, 4, 8)
    ]
    assert times == sorted(times)
