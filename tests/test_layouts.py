"""Twenty training steps are the same under every parallel layout."""

from pathlib import Path

import pytest

# name: (ranks, Megatron flags)
SAMPLE = {
    "dp2": (2, ""),
    "tp2-sp-pp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    ),
}
REST = {
    "micro4": (1, "--micro-batch-size 4"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "dp2-replicated": (2, "--num-distributed-optimizer-instances 2"),
    "micro1": (1, "--micro-batch-size 1"),
    "pp2-dp2": (4, "--pipeline-model-parallel-size 2"),
    "pp2-dp2-replicated": (4, "--pipeline-model-parallel-size 2 --num-distributed-optimizer-instances 2"),
    "pp2-dp2-overlap": (
        4,
        "--pipeline-model-parallel-size 2 --overlap-grad-reduce --overlap-param-gather",
    ),
    "dp2-overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "dp2-overlap-recompute": (
        2,
        "--overlap-grad-reduce --overlap-param-gather "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "tp2-sp-pp2-recompute": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference(tmp_path_factory, write_config):
    return {}


def check(name, ranks, flags, recurrence, tmp_path, write_config, train, reference, tmp_path_factory):
    key = str(sorted(recurrence.items()))
    if key not in reference:
        folder = tmp_path_factory.mktemp("single")
        reference[key] = train(write_config(folder, recurrence=recurrence))
    expected = reference[key]
    steps = train(write_config(tmp_path, recurrence=recurrence), ranks, flags)
    assert [s["iteration"] for s in steps] == list(range(1, 21))
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.5, "the reference run did not learn"
    for ours, theirs in zip(steps, expected, strict=True):
        for value in ("loss", "grad_norm"):
            assert ours[value] == pytest.approx(theirs[value], rel=TOLERANCE), (name, ours, theirs)


@pytest.mark.parametrize("name", SAMPLE)
def test_layout(name, tmp_path: Path, write_config, train, reference, tmp_path_factory):
    ranks, flags = SAMPLE[name]
    check(name, ranks, flags, {}, tmp_path, write_config, train, reference, tmp_path_factory)


@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_layout_rest(name, tmp_path: Path, write_config, train, reference, tmp_path_factory):
    ranks, flags = REST[name]
    check(name, ranks, flags, {}, tmp_path, write_config, train, reference, tmp_path_factory)


OPTIONS = {
    "injection": {"injection": "add"},
    "sequence": {"order": "sequence"},
    "truncated": {"injection": "add", "backprop_loops": 2},
    "random": {"random_loops": [1, 3]},
    "no-scales": {"loop_scales": False},
    "corrections": {"loop_rank": 2},
}


def test_injection_and_corrections_over_ranks(tmp_path: Path, write_config, train, reference, tmp_path_factory):
    ranks, flags = REST["tp2-pp2"]
    options = {**OPTIONS["injection"], **OPTIONS["corrections"]}
    check("tp2-pp2", ranks, flags, options, tmp_path, write_config, train, reference, tmp_path_factory)


@pytest.mark.full
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["pp2", "pp4", "tp2-sp", "tp2-pp2", "dp2-overlap"])
def test_layout_of_options(name, option, tmp_path: Path, write_config, train, reference, tmp_path_factory):
    ranks, flags = {**SAMPLE, **REST}[name]
    args = (tmp_path, write_config, train, reference, tmp_path_factory)
    check(f"{name}-{option}", ranks, flags, OPTIONS[option], *args)
