"""A trace is read rightly."""


def kernel(name, ts, dur, cat="kernel"):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_busy_time_counts_overlap_once_and_gaps_between(benchmark_script):
    busy = benchmark_script("profile_step").busy
    assert busy([(10, 20), (0, 4), (12, 15), (18, 25), (25, 26), (30, 31)]) == (4 + 15 + 1 + 1, [6, 4])
    assert busy([]) == (0, [])


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
    assert lines[0] == "0.6 ms a step, busy 0.5 ms (83.3%), 0 gaps, the longest 0.20 ms."
    assert "| matrix products | 0.30 | 60.0% | 0 |" in lines
    assert "| attention | 0.15 | 30.0% | 0 |" in lines
    assert "| other element-wise | 0.05 | 10.0% | 0 |" in lines
    assert "| copies | 0.05 | 10.0% | 0 |" in lines
