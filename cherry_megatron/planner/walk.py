"""Seconds of one walk over a sublayer, the embedding or the head: forward and backward, of the GPU and of Python.

Bytes are those of the kernels that Transformer Engine and Megatron 0.19.2 run, counted by hand: each value read or
written by a kernel of its own. A matrix product of a linear layer is one forward and two backward, of the same
sizes in another order.
"""

from dataclasses import dataclass

from cherry_megatron.model.pattern import AHEAD, ATTENTION, MLP
from cherry_megatron.planner.job import Job, Setting
from cherry_megatron.planner.rates import Rates

# Kernels of a sublayer, forward and backward.
_KERNELS = {ATTENTION: (6, 13), MLP: (5, 10)}
_EXPERTS_KERNELS = (30, 50)
# Python's share of a layer of experts, in sublayers: router, permutation, dispatcher. Not measured.
_EXPERTS_HOST = 4
_CROSS_ENTROPY = (2, 2)  # passes over the logits: read, and a copy kept; read, and the gradient in its place


@dataclass(frozen=True)
class Pass:
    """Seconds of one direction through something.

    Attributes:
        products, attention, elementwise, exchange: of the GPU, one after the other.
        host: of Python, which launches them beside.
    """

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    exchange: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> "Pass":
        return Pass(*(value * times for value in vars(self).values()))

    @property
    def gpu(self) -> float:
        return self.products + self.attention + self.elementwise + self.exchange


Both = tuple[Pass, Pass]  # forward, backward


@dataclass(frozen=True)
class Walk:
    """One rank's walks of a setting.

    Attributes:
        job, setting, rates: of what, how and on what.
        rows: sequences that are walked at once; of a mixture, those of an expert.
    """

    job: Job
    setting: Setting
    rates: Rates
    rows: float

    @property
    def tokens(self) -> float:
        return self.rows * self.job.sequence

    def sublayer(self, symbol: str, looped: bool) -> Both:
        """A sublayer of the stack.

        Args:
            symbol: which.
            looped: whether it is of the core, with what the configuration gives each loop.
        """
        shape, measured = self.job.shape, self.rates.measured
        forward, backward = self._kernels(symbol)
        if symbol == ATTENTION:
            both = self.rates.attention(
                self.tokens, shape.heads * shape.head_size / self.setting.tensor, shape.head_size, self.job.sequence
            )
            share = measured.attention_forward
            forward, backward = (
                forward + Pass(attention=share * both),
                backward + Pass(attention=(1 - share) * both),
            )
        if symbol in (ATTENTION, MLP):
            forward, backward = _sum((forward, backward), self._linears(symbol), self._between_tensor_ranks())
        else:
            forward, backward = _sum((forward, backward), self._experts(), self._between_expert_ranks())
        if looped:
            forward, backward = _sum((forward, backward), self._of_loop(symbol))
        slower = measured.host_fp8 if self.job.fp8 else 1.0
        times = (1 if symbol in (ATTENTION, MLP) else _EXPERTS_HOST) * slower
        return forward + Pass(host=measured.host_forward * times), backward + Pass(
            host=measured.host_backward * times
        )

    def _kernels(self, symbol: str) -> Both:
        """Norm, residual, rotation or activation: values read and written for a token."""
        shape, tensor = self.job.shape, self.setting.tensor
        states = shape.hidden / tensor  # sequence parallelism goes with tensor parallelism
        query, groups = shape.heads * shape.head_size / tensor, shape.groups * shape.head_size / tensor
        forward, backward = 5 * states, 4 * states  # the stream's gradient is added by the norm's kernel
        if symbol == ATTENTION:
            forward += 2 * (query + 2 * groups)
            backward += 2 * (query + 2 * groups)
        else:
            inner, copies = shape.ffn / tensor, 1
            if symbol != MLP:
                inner, copies = shape.expert_ffn / self.setting.expert_tensor, shape.top_k
                forward += 8 * states * copies  # to the experts' order and back
                backward += 8 * states * copies
            forward += (3 if shape.gated else 2) * inner * copies
            backward += (5 if shape.gated else 3) * inner * copies
        launches = _KERNELS.get(symbol, _EXPERTS_KERNELS)
        return self._elementwise(forward, launches[0]), self._elementwise(backward, launches[1])

    def _elementwise(self, values: float, kernels: float) -> Pass:
        moved = values * self.tokens * self.job.width
        return Pass(elementwise=self.rates.stream(moved) + kernels * self.rates.measured.launch)

    def _linears(self, symbols: str) -> Both:
        """The linear layers of sublayers; the first of each is cut by its outputs, the second by its inputs."""
        forward = backward = Pass()
        for number, (inputs, outputs) in enumerate(self.job.shape.linears(symbols)):
            cut = self.setting.tensor
            size = (inputs, outputs / cut) if number % 2 == 0 else (inputs / cut, outputs)
            forward, backward = _sum((forward, backward), self._linear(self.tokens, *size))
        # Autograd adds up the gradients of a weight over its walks.
        weights = self.job.shape.matmul_weights(symbols) / self.setting.tensor
        return forward, backward + Pass(elementwise=self.rates.stream(3 * weights * self.job.width))

    def _linear(self, rows: float, inputs: float, outputs: float, experts: float = 1) -> Both:
        fp8, width = self.job.fp8, self.job.width
        once = self.rates.product(rows, inputs, outputs, fp8 is not None, width)
        others = self.rates.product(rows, outputs, inputs, fp8 is not None, width)
        others += self.rates.product(inputs, rows, outputs, fp8 is not None, width)
        casts = [0.0, 0.0]
        if fp8:
            # Read in BF16, written in FP8 twice, as it is and transposed. The delayed recipe knows its scales, the
            # others look for the largest value first.
            look = 0 if fp8 == "delayed" else 2
            casts = [rows * inputs * (4 + look), rows * outputs * (4 + look)]
        forward, backward = (
            Pass(products=seconds, elementwise=self.rates.stream(moved))
            for seconds, moved in zip((once, others), casts, strict=True)
        )
        return forward * experts, backward * experts

    def _between_tensor_ranks(self) -> Both:
        """Sequence parallelism gathers before a sublayer's first layer and scatters sums behind its last.

        Korthikanti et al. 2022, section 4.2.2. The gathering of the input for the weight's gradient is hidden
        beside the product before it, but Python launches it.
        """
        ranks = self.setting.tensor
        if ranks == 1:
            return Pass(), Pass()
        size = self.tokens * self.job.shape.hidden * self.job.width
        seconds = 2 * self.rates.exchange("all-gather", size, ranks, min(ranks, self.rates.gpu.host))
        launch = self.rates.measured.host_exchange
        return Pass(exchange=seconds, host=2 * launch), Pass(exchange=seconds, host=3 * launch)

    def _experts(self) -> Both:
        """Router, and the experts of a layer that are here, each with its even share of the copies."""
        shape, setting = self.job.shape, self.setting
        here = shape.experts / setting.expert
        copies = self.tokens * shape.top_k * setting.expert_tensor / setting.tensor / here
        inner = shape.expert_ffn / setting.expert_tensor
        first = self._linear(copies, shape.hidden, inner * (2 if shape.gated else 1), here)
        second = self._linear(copies, inner, shape.hidden, here)
        router = self._linear(self.tokens / setting.tensor, shape.hidden, shape.experts)
        weights = shape.expert_weights("E") * here / setting.expert_tensor
        summed = Pass(elementwise=self.rates.stream(3 * weights * self.job.width))
        return _sum(first, second, router, (Pass(), summed))

    def _between_expert_ranks(self) -> Both:
        """Copies of tokens to their experts and back (docs/moee.md); within an expert's ranks, gathered."""
        setting, shape = self.setting, self.job.shape
        size = self.tokens / setting.tensor * shape.top_k * shape.hidden * self.job.width
        ranks = setting.expert
        here = min(ranks, max(self.rates.gpu.host // setting.expert_tensor, 1))
        seconds = 2 * self.rates.exchange("all-to-all", size, ranks, here)
        within = setting.expert_tensor
        seconds += 2 * self.rates.exchange("all-gather", size * within, within, min(within, self.rates.gpu.host))
        calls = 3 * (ranks > 1) + 2 * (within > 1)
        each = Pass(exchange=seconds, host=calls * self.rates.measured.host_exchange)
        return each, each

    def _of_loop(self, symbol: str) -> Both:
        """Vectors and corrections of each loop."""
        recurrence, shape, tensor = self.job.recurrence, self.job.shape, self.setting.tensor
        forward = backward = Pass()
        if recurrence.loop_scales:
            # An output that is scaled, whose gradient also goes to the scale.
            host = self.rates.measured.host_unfused
            forward += self._elementwise(2 * shape.hidden / tensor, 3) + Pass(host=host)
            backward += self._elementwise(5 * shape.hidden / tensor, 6) + Pass(host=host)
        for inputs, outputs in shape.linears(symbol) if recurrence.loop_rank else ():
            rank = recurrence.loop_rank
            down, up = self._linear(self.tokens, inputs, rank), self._linear(self.tokens, rank, outputs)
            added = self._elementwise(3 * outputs, 2), self._elementwise(inputs * 3, 2)
            launched = Pass(host=self.rates.measured.host_unfused)
            forward, backward = _sum((forward, backward), down, up, added, (launched, launched))
        return forward, backward

    def embedding(self) -> Both:
        """Rows that are looked up; a gradient of the whole matrix, most of it zero."""
        shape, tensor = self.job.shape, self.setting.tensor
        matrix = self.rates.stream(2 * shape.vocabulary_weights / tensor * self.job.width)
        return self._elementwise(2 * shape.hidden / tensor, 4), Pass(elementwise=matrix)

    def head(self) -> Both:
        """Output layer and cross-entropy, which are in BF16 whatever the layers are in."""
        shape, tensor = self.job.shape, self.setting.tensor
        columns, width = shape.vocabulary / tensor, self.job.width
        once = self.rates.product(self.tokens, shape.hidden, columns, width=width)
        others = self.rates.product(self.tokens, columns, shape.hidden, width=width)
        others += self.rates.product(shape.hidden, self.tokens, columns, width=width)
        loss = [self.rates.stream(each * self.tokens * columns * width) for each in _CROSS_ENTROPY]
        both = Pass(products=once, elementwise=loss[0]), Pass(products=others, elementwise=loss[1])
        return _sum(both, self._between_tensor_ranks())

    def ahead(self) -> Both:
        """A depth of multi-token prediction: its layer, what joins its inputs, and the head once more."""
        hidden = self.job.shape.hidden
        joined = self._linear(self.tokens, 2 * hidden, hidden / self.setting.tensor)
        return _sum(joined, *(self.sublayer(symbol, False) for symbol in AHEAD), self.head())


def _sum(*passes: Both) -> Both:
    forward = backward = Pass()
    for there, back in passes:
        forward, backward = forward + there, backward + back
    return forward, backward
