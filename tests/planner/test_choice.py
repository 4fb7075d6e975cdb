"""What is proposed is allowed, the fastest that fits, and said to be so; what cannot be is one sentence."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.planner.candidates import allowed, candidates
from cherry_megatron.planner.choice import choose, why_not
from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.planner.job import Setting, configured, setting_of, settled
from cherry_megatron.planner.rates import Rates
from tests.planner.conftest import DERIVED

H100 = Rates(GPUS["h100"], read("h100", DERIVED))
NAMES = ("cherry_227m", "dense_566m", "base_1b", "cherry_1p8b", "layers_227m", "cherry_tiny")
OPTIONS = (
    "megatron.num-attention-heads=16", "megatron.padded-vocab-size=44550", "mtp.depths=1", "recurrence.loops=3",
    "recurrence.random_loops=[1,2]", "megatron.expert-tensor-parallel-size=1",
    "megatron.cuda-graph-impl=full_iteration",
    "megatron.pipeline-model-parallel-size=2", "megatron.untie-embeddings-and-output-weights=false",
    "megatron.rampup-batch-size=[8,8,64]", "moee.top_k=0", "megatron.seq-length=96", "recurrence.stages=[17,17]",
    "megatron.num-distributed-optimizer-instances=2",
)  # fmt: skip


@given(
    name=st.sampled_from(NAMES),
    options=st.lists(st.sampled_from(OPTIONS), max_size=2, unique=True),
    gpus=st.sampled_from((1, 2, 3, 4, 6, 8, 16, 24, 64, 512)),
    draw=st.randoms(use_true_random=False),
)
@settings(max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_setting_that_is_weighed_passes_the_configurations_own_rules(name, options, gpus, draw, job):
    try:
        made = job(name, *options)
    except CherryError:  # these do not go together whatever the layout
        return
    found = list(candidates(made, gpus, 8))
    for setting in draw.sample(found, min(len(found), 2)):
        assert allowed(made, setting) is None, setting
        assert setting.gpus == gpus
        assert setting_of(configured(made, setting), gpus) == setting


@pytest.mark.parametrize(
    "refused",
    [
        Setting(tensor=3, data=1),  # ten heads
        Setting(pipeline=40),  # more stages than layers
        Setting(data=3),  # 512 sequences
        Setting(pipeline=2, graph=True),
        Setting(recompute=True, graph=True),
    ],
)
def test_what_the_rules_refuse_is_not_weighed(refused, job):
    made = job("cherry_227m")
    assert allowed(made, refused) is not None
    assert refused not in list(candidates(made, refused.gpus, 8))


def test_the_fastest_that_fits_is_proposed(job):
    made = job("cherry_227m", batch=64)
    found = choose(made, 2, H100)
    fitting = [one for one, why in found.others if not why.startswith("does not fit")]
    assert all(found.best.step.seconds <= one.step.seconds * 1.0101 for one in fitting)
    assert found.best.peak < GPUS["h100"].memory
    assert found.tried[0] >= found.tried[1] > len(found.others)
    assert len({one.kind for one, _ in found.others}) == len(found.others)


def test_a_small_gpu_gets_another_proposal(job):
    made = job("cherry_227m", batch=64)
    small = Rates(replace(H100.gpu, memory=16 * 2**30), H100.measured)
    best, less = choose(made, 1, H100).best, choose(made, 1, small).best
    assert less.peak < 16 * 2**30 - H100.measured.reserved < best.peak
    assert less.step.seconds > best.step.seconds
    assert why_not(best, less, 16 * 2**30 - 4e9).startswith("does not fit: ")


def test_why_a_setting_is_slower_is_its_largest_part(job):
    made = job("dense_566m", batch=64)
    found = choose(made, 1, H100)
    reasons = {one.setting: why for one, why in found.others}
    (again,) = [why for setting, why in reasons.items() if setting.recompute]
    assert "slower: matrix products +" in again


def test_a_flag_that_is_given_is_kept(job):
    made = job("cherry_227m", flags=("--tensor-model-parallel-size", "2", "--sequence-parallel"))
    assert {setting.tensor for setting in candidates(made, 4, 8)} == {2}
    assert choose(made, 4, H100).best.setting.tensor == 2


def test_what_to_set_makes_the_proposal(job):
    made = job("base_1b", "recurrence.stages=[24,24]", "megatron.pipeline-model-parallel-size=2")
    changes = settled(made, Setting(tensor=2, data=2, micro_batch=8, recompute=True))
    assert changes == {
        "megatron.tensor-model-parallel-size": 2,
        "megatron.pipeline-model-parallel-size": 1,
        "megatron.micro-batch-size": 8,
        "megatron.sequence-parallel": True,
        "megatron.recompute-granularity": "full",
        "megatron.recompute-method": "uniform",
        "megatron.recompute-num-layers": 1,
        "recurrence.stages": None,
    }
    assert settled(made, Setting(pipeline=2, data=2, micro_batch=4)) == {}


def test_a_model_that_fits_nowhere_is_told_what_would(job):
    wide = job(
        "base_1b", "megatron.hidden-size=5120", "megatron.ffn-hidden-size=12800", "megatron.num-attention-heads=40"
    )
    with pytest.raises(CherryError, match=r"no layout fits 1 H100s: the smallest \(.*\) needs .* GPUs would do"):
        choose(wide, 1, H100)
    with pytest.raises(CherryError, match="no layout shares out 512 sequences a step over 37 GPUs"):
        choose(job("cherry_227m"), 37, H100)
    instances = "megatron.num-distributed-optimizer-instances=3"
    with pytest.raises(CherryError, match="over 8 GPUs with 3 num-distributed-optimizer-instances; use"):
        choose(job("cherry_227m", instances), 8, H100)
    assert "3 does not divide the 8 data-parallel ranks" in allowed(job("cherry_227m", instances), Setting(data=8))


def test_what_only_the_rules_know_is_told_as_they_tell_it(job, monkeypatch):
    monkeypatch.setattr("cherry_megatron.planner.choice.allowed", lambda job, setting: "a key does not go with it")
    with pytest.raises(CherryError, match=r"^a key does not go with it$"):
        choose(job("cherry_227m", batch=8), 1, H100)
