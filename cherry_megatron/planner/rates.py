"""Seconds that a GPU needs for one operation: what its datasheet allows, times what was measured to be reached."""

from dataclasses import dataclass
from math import log2

from cherry_megatron.planner.coefficients import Coefficients
from cherry_megatron.planner.hardware import Gpu

# Bytes on the wire of a collective over n ranks, as a share of the whole tensor's (NCCL tests, PERFORMANCE.md).
_VOLUME = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0, "all-reduce": 2.0}


@dataclass(frozen=True)
class Rates:
    """A kind of GPU and what was measured of it."""

    gpu: Gpu
    measured: Coefficients

    def product(self, rows: float, inner: float, columns: float, fp8: bool = False, width: int = 2) -> float:
        """Seconds of [rows, inner] x [inner, columns]: a roofline (Williams et al. 2009) of compute and memory.

        A product whose smallest dimension is d reaches d / (d + small_products) of what large ones do: begin and
        end of a tile take their time however long it is. In float32 it has half of the rate, TF32's (datasheet).
        """
        smallest = min(rows, inner, columns)
        if smallest < 1:
            return 0.0
        peak = self.gpu.fp8 * self.measured.fp8_products if fp8 else self.gpu.bf16 * self.measured.products
        peak /= 2 if width == 4 else 1
        reached = peak * smallest / (smallest + self.measured.small_products)
        moved = (rows * inner + inner * columns) * (1 if fp8 else width) + rows * columns * width
        return max(2 * rows * inner * columns / reached, self.stream(moved))

    def attention(self, tokens: float, width: float, head_size: int, sequence: int) -> float:
        """Seconds of causal attention, forward and backward, of heads that are so wide together.

        6 x width x sequence FLOPs a token, as in model/shape.py. Between and beyond heads of 64 and 128 the rate is
        taken to follow a straight line, below 64 the size.
        """
        low, high = self.measured.attention_64, self.measured.attention_128
        rate = low * head_size / 64 if head_size < 64 else low + (high - low) * min((head_size - 64) / 64, 1.0)
        rate *= sequence / (sequence + self.measured.short_attention)
        return 6 * width * sequence * tokens / (self.gpu.bf16 * rate)

    def stream(self, moved: float) -> float:
        """Seconds to read and write so many bytes of memory."""
        return moved / (self.gpu.bandwidth * self.measured.stream)

    def exchange(self, kind: str, size: float, ranks: int, here: int) -> float:
        """Seconds of a collective.

        Args:
            kind: of `_VOLUME`.
            size: bytes of the whole tensor.
            ranks: that take part.
            here: of them in one host. Each has an adapter, so that a ring over hosts has as many.
        """
        if ranks < 2:
            return 0.0
        rate = self.gpu.link * self.measured.link
        if here < ranks:
            rate = min(rate, self.gpu.network * self.measured.network * here)
        return _VOLUME[kind] * size * (ranks - 1) / ranks / rate + self.measured.latency * log2(ranks)

    def send(self, size: float, within: bool) -> float:
        """Seconds to hand bytes on to another rank, of the same host or not."""
        rate = self.gpu.link * self.measured.link if within else self.gpu.network * self.measured.network
        return size / rate + self.measured.latency
