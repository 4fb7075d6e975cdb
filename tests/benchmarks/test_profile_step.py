"""A trace is read rightly."""


def kernel(name, ts, dur, cat="kernel"):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


SPANS = {"b": (10, 20), "a": (0, 4), "c": (12, 15), "d": (18, 25), "e": (25, 26), "f": (30, 31)}


def test_busy_time_counts_overlap_once(benchmark_script):
    busy = benchmark_script("profile_step").busy
    assert busy(SPANS.values()) == 4 + 15 + 1 + 1
    assert busy([]) == 0


def test_a_gap_is_between_what_ended_last_and_what_begins_next(benchmark_script):
    gaps = benchmark_script("profile_step").gaps
    events = [kernel(name, begin, end - begin) for name, (begin, end) in SPANS.items()]
    assert gaps(events) == {("a", "b"): [6], ("e", "f"): [4]}
    inner = [kernel("long", 0, 10), kernel("short", 2, 3), kernel("next", 12, 1)]
    assert gaps(inner) == {("long", "next"): [2]}
    assert gaps([]) == {}


def test_a_kernel_that_does_not_cast_is_no_cast(benchmark_script):
    class_of = benchmark_script("profile_step").class_of
    casts = "casts and transposes"
    assert class_of("void transformer_engine::cast_kernel") == class_of("elementwise<LoadWithCast<1>>") == casts
    for name in ("gpu_kernel_impl_nocast<MulFunctor>", "unrolled<LoadWithoutCast>", "broadcast_kernel"):
        assert class_of(name) == "other element-wise"


def test_a_kernel_of_inductor_is_what_it_computes(benchmark_script):
    """Whatever casts, views and copies its name has beside that."""
    class_of = benchmark_script("profile_step").class_of
    for name in ("red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "per_fused__to_copy_add_mean_mul_sub_sum_0"):
        assert class_of(f"triton_{name}") == "norms"
    for name in ("add_0", "add_transpose_view_1", "add_copy__2"):
        assert class_of(f"triton_poi_fused_{name}") == "other element-wise"
    assert class_of("triton_poi_fused_add_cat_mul_rsub_sigmoid_silu_split_0") == "SwiGLU"
    assert class_of("triton_poi_fused__to_copy_add_flip_mul_0") == "rotary positions"
    assert class_of("triton_poi_fused__to_copy_0") == "copies"


def test_report(benchmark_script):
    events = [
        kernel("nvjet_hsh_256x128", 0, 600),
        kernel("void cudnn_generated_fort_native_sdpa_sm90", 500, 300),
        kernel("Memcpy DtoD", 1000, 100, "gpu_memcpy"),
        kernel("at::native::vectorized_elementwise_kernel<CUDAFunctor_add>", 1100, 100),
        kernel("cudaLaunchKernel", 0, 5000, "cuda_runtime"),
        {"ph": "i", "name": "nvjet", "ts": 9000},
    ]
    lines = benchmark_script("profile_step").report(events, 2)
    assert lines[0] == (
        "0.6 ms a step, busy 0.5 ms (83.3%), 0 gaps, the longest 0.20 ms; 0 are longer than 20 us, 0.10 ms a step."
    )
    assert "| `void cudnn_generated_fort_native_sdpa_sm90` | `Memcpy DtoD` | 0.10 | 0.5 |" in lines
    assert "| matrix products | 0.30 | 60.0% | 0 |" in lines
    assert "| attention | 0.15 | 30.0% | 0 |" in lines
    assert "| other element-wise | 0.05 | 10.0% | 0 |" in lines
    assert "| copies | 0.05 | 10.0% | 0 |" in lines
