"""The Transformer Engine specs on a GPU agree with the local ones, in FP32, BF16 and FP8.

Tolerances: Transformer Engine multiplies FP32 matrices in TF32, and the fused attention's
backward pass is not deterministic; BF16 has 8 bits of mantissa, so single losses of
the first steps, of about 6.2, agree to some 1e-3; FP8 is held against BF16.
"""

from pathlib import Path

import pytest

from tests.conftest import HAS_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]

# FP8 products need dimensions that are multiples of 16, graphs with cuDNN's attention sequences of 128.
WIDE = {"hidden-size": 64, "ffn-hidden-size": 128, "num-attention-heads": 4, "lr": 5e-4}
WIDE |= {"seq-length": 128, "max-position-embeddings": 128}
# What the core has of each loop: nothing, so that its norms are fused; vectors; low-rank corrections.
KINDS = {"fused-norm": {"loop_scales": False}, "loop-scales": {}, "corrections": {"loop_rank": 2}}
GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
LOCAL = "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion"
VARIANTS = {
    "local-fp32": LOCAL,
    "te-fp32": "",
    "local-bf16": f"{LOCAL} --bf16",
    "te-bf16": "--bf16",
    "te-fp8-delayed": "--bf16 --fp8-format hybrid --fp8-recipe delayed",
    "te-fp8-tensorwise": "--bf16 --fp8-format hybrid --fp8-recipe tensorwise",
    "te-bf16-recompute": "--bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "te-bf16-graph": f"--bf16 {GRAPH}",
    "te-fp8-graph": f"--bf16 --fp8-format hybrid --fp8-recipe delayed {GRAPH}",
    "te-fp8-recompute": "--bf16 --fp8-format hybrid --fp8-recipe delayed --recompute-granularity full "
    "--recompute-method uniform --recompute-num-layers 1",
}
# (variant, compared with, largest relative difference of a step's loss, of a gradient norm)
PAIRS = [
    ("te-fp32", "local-fp32", 1e-3, 1e-2),
    ("local-bf16", "local-fp32", 5e-3, 5e-2),
    ("te-bf16", "local-fp32", 5e-3, 5e-2),
    ("te-bf16-recompute", "te-bf16", 5e-4, 5e-3),
    ("te-fp8-delayed", "te-bf16", 1e-2, 1e-1),
    ("te-fp8-tensorwise", "te-bf16", 1e-2, 1e-1),
    ("te-bf16-graph", "te-bf16", 5e-4, 5e-3),
    ("te-fp8-graph", "te-fp8-delayed", 5e-3, 5e-2),
    ("te-fp8-recompute", "te-fp8-delayed", 5e-3, 5e-2),
]


@pytest.fixture(scope="module")
def curves(tmp_path_factory, write_config, train):
    done: dict[tuple, list] = {}

    def get(variant: str, kind: str):
        if (variant, kind) not in done:
            path = write_config(tmp_path_factory.mktemp(variant), megatron=WIDE, recurrence=KINDS[kind])
            done[variant, kind] = train(path, flags=VARIANTS[variant])
        return done[variant, kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("variant", "against", "loss", "norm"), PAIRS, ids=[p[0] for p in PAIRS])
def test_twenty_steps_agree(variant, against, loss, norm, kind, curves):
    ours, theirs = curves(variant, kind), curves(against, kind)
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.3

    def worst(key):
        return max(abs(a[key] - b[key]) / b[key] for a, b in zip(ours, theirs, strict=True))

    print(f"{variant} against {against}: loss {worst('loss'):.2e}, gradient norm {worst('grad_norm'):.2e}")
    assert worst("loss") <= loss
    assert worst("grad_norm") <= norm


@pytest.mark.parametrize(
    ("first", "second", "tolerance"),
    [
        ("te-bf16", "local-bf16", 5e-3),
        ("local-bf16", "te-bf16", 5e-3),
        ("te-fp8-delayed", "te-bf16", 1e-2),
        ("te-bf16", "te-fp8-delayed", 1e-2),
        ("te-fp8-delayed", "local-bf16", 1e-2),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_other_layers(first, second, tolerance, kind, tmp_path: Path, write_config, train, curves):
    path = write_config(tmp_path, megatron=WIDE, recurrence=KINDS[kind])
    train(path, flags=f"{VARIANTS[first]} --exit-interval 10 --save-interval 10")
    steps = train(path, flags=VARIANTS[second])
    assert [s["iteration"] for s in steps] == list(range(1, 21))
    for ours, theirs in zip(steps[10:], curves("te-bf16", kind)[10:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
