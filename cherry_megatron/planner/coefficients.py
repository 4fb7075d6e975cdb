"""What was measured of a kind of GPU: the numbers of the cost model, from coefficients.yaml.

`benchmarks/calibrate_planner.py` writes that file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError, naming
from cherry_megatron.sections import section_of
from cherry_megatron.yaml_files import read_file

FILE = Path(__file__).with_name("coefficients.yaml")
# What is divided by.
_POSITIVE = ("products", "fp8_products", "attention_64", "attention_128", "stream", "link", "network")


@dataclass(frozen=True)
class Coefficients:
    """Of one kind of GPU and of the host that it was measured in.

    Attributes:
        source: what they are from, in words: GPU, date and commit, or that they are derived.
        calibrated: whether `benchmarks/calibrate_planner.py` measured them.
        products, fp8_products: share of the datasheet's FLOP/s that large matrix products reach.
        small_products: size at which a product's smallest dimension halves that.
        attention_64, attention_128: share of the datasheet's BF16 FLOP/s that attention reaches with heads of that
            size, forward and backward together, of the causal half.
        attention_forward: share of its time that the forward pass takes.
        short_attention: length of a sequence that halves it.
        stream: share of the memory's bandwidth that element-wise operations reach.
        launch: seconds that a GPU loses between two kernels.
        link, network: share of the links' bytes/s that collectives reach.
        latency: seconds of the smallest collective.
        skew: share of a step that two ranks wait for each other.
        host_forward, host_backward: seconds that Python takes to launch a sublayer.
        host_unfused: to launch a norm of its own, and what is of a loop, besides.
        host_fp8: how many times as long a sublayer in FP8 takes.
        host_exchange: seconds that Python takes to launch a collective within a layer.
        host_micro_batch, host_step: that it takes once a micro-batch, once a step.
        overhead: bytes that libraries allocate through torch.
        reserved: bytes that are not to be had through torch: CUDA's context, NCCL, fragments.
    """

    source: str
    calibrated: bool
    products: float
    fp8_products: float
    small_products: float
    attention_64: float
    attention_128: float
    attention_forward: float
    short_attention: float
    stream: float
    launch: float
    link: float
    network: float
    latency: float
    skew: float
    host_forward: float
    host_backward: float
    host_unfused: float
    host_fp8: float
    host_exchange: float
    host_micro_batch: float
    host_step: float
    overhead: float
    reserved: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not 0 <= value < float("inf"):
                raise CherryError(f"{name} {value} must be a finite number that is not negative")
            if name in _POSITIVE and value == 0:
                raise CherryError(f"{name} is 0, so nothing would ever end; it must be more")


def read(gpu: str, path: Path = FILE) -> Coefficients:
    """Those of a kind of GPU.

    Raises:
        CherryError: if the file has none, or says what cannot be.
    """
    values: dict[str, Any] = read_file(path)
    if gpu not in values:
        raise CherryError(f"{path} has no coefficients of {gpu}; measure them with benchmarks/calibrate_planner.py")
    with naming(path):
        found: Coefficients = section_of(path, gpu, Coefficients, values[gpu])
    return found
