"""What GPUs and the links between them can do, by their makers' datasheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU in hosts of eight.

    Attributes:
        name: as torch calls it, in part.
        bf16, fp8: dense FLOP/s of matrix products.
        bandwidth: bytes/s of its memory.
        memory: bytes that torch finds.
        link: bytes/s that it sends to the others of its host, in one direction.
        network: bytes/s that it sends to other hosts.
        host: GPUs of a host.
    """

    name: str
    bf16: float
    fp8: float
    bandwidth: float
    memory: float
    link: float
    network: float
    host: int = 8


# H100 and H200 SXM, NVIDIA's datasheets: NVLink 4, 900 GB/s in both directions together. The network is an
# assumption: one 400 Gbit/s adapter a GPU, as in DGX H100.
GPUS = {
    "h100": Gpu("H100", 989e12, 1979e12, 3.35e12, 79.2 * 2**30, 450e9, 50e9),
    "h200": Gpu("H200", 989e12, 1979e12, 4.8e12, 139.8 * 2**30, 450e9, 50e9),
}
