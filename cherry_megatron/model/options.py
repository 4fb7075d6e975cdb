"""What a user says about the model: the `recurrence:`, `mtp:` and `moee:` sections of a configuration."""

import math
from dataclasses import dataclass
from typing import Literal

from cherry_megatron.errors import CherryError
from cherry_megatron.model.pattern import MOE, MOST_LAYERS, ORDERS, Order, Pattern, Visit, parse, unroll

Injection = Literal["none", "add"]


@dataclass(frozen=True)
class Recurrence:
    """The recurrent stack.

    Attributes:
        pattern: stored layers and loops, see pattern.py.
        loops: how often the core is walked; 0 takes the pattern's number.
        order: `cycle` walks the core from front to back each time, `sequence` each core layer
            all its times before the next.
        loop_scales: learned vectors per loop on norm weights and sublayer outputs (see loops.py).
        loop_rank: rank of the correction that each loop adds to the core's weights (see corrections.py);
            0 for none.
        loop_routers: weights of each loop for the routers of the core's layers `E` (see experts.py).
        injection: `add` adds the prelude's output to the state at the start of every loop but the
            first (Geiping et al. 2025, section 3); `none` does not.
        random_loops: [least, most]: draw the number of loops of each training step from it, evenly.
        backprop_loops: carry the gradient through the last so many loops only.
        stages: effective layers of each pipeline stage; by default they are balanced by cost.
    """

    pattern: str
    loops: int = 0
    order: Order = "cycle"
    loop_scales: bool = False
    loop_rank: int = 0
    loop_routers: bool = False
    injection: Injection = "none"
    random_loops: tuple[int, int] | None = None
    backprop_loops: int | None = None
    stages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        pattern = parse(self.pattern)
        if self.loops < 0:
            raise CherryError(f"recurrence.loops is {self.loops}; use a positive number, or 0 for the pattern's")
        if self.loops == 0:
            object.__setattr__(self, "loops", pattern.loops)
        if self.loop_rank < 0:
            raise CherryError(f"recurrence.loop_rank is {self.loop_rank}; use a positive rank, or 0 for none")
        if self.order not in ORDERS:
            raise CherryError(f"recurrence.order {self.order!r} is not one of {', '.join(ORDERS)}")
        if self.injection not in ("none", "add"):
            raise CherryError(f"recurrence.injection {self.injection!r} is not one of none, add")
        if self.loop_routers and MOE not in "".join(pattern.core):
            raise CherryError(
                f"recurrence.loop_routers: no layer of the core of recurrence.pattern {self.pattern!r} is an 'E'; "
                "take it out"
            )
        if self.loop_rank and MOE in "".join(pattern.core):
            raise CherryError("recurrence.loop_rank: corrections of experts are not built; use 0 with a layer 'E'")
        self._check_loops(pattern)

    def _check_loops(self, pattern: Pattern) -> None:
        if pattern.loops == 1 and self.loops != 1 and not (pattern.prelude or pattern.coda):
            raise CherryError(
                f"recurrence.loops is {self.loops}, but recurrence.pattern {self.pattern!r} has no loop; "
                "write the core as [layers]xN"
            )
        if (effective := pattern.effective(self.loops)) > MOST_LAYERS:
            raise CherryError(
                f"recurrence.loops is {self.loops}, which makes {effective} effective layers, more than "
                f"{MOST_LAYERS}; use fewer loops"
            )
        if self.order == "sequence" and (self.injection == "add" or self.backprop_loops is not None):
            raise CherryError(
                "recurrence.order sequence has no loop over the whole core, so recurrence.injection add and "
                "recurrence.backprop_loops need order cycle"
            )
        if self.backprop_loops is not None:
            if not 1 <= self.backprop_loops <= self.loops:
                raise CherryError(f"recurrence.backprop_loops {self.backprop_loops} must be 1 to {self.loops}")
            if self.injection != "add":
                raise CherryError(
                    "recurrence.backprop_loops needs recurrence.injection add: without it neither the prelude "
                    "nor the embedding would get a gradient"
                )
        if self.random_loops is not None and not (
            len(self.random_loops) == 2 and 1 <= self.random_loops[0] <= self.random_loops[1] <= self.loops
        ):
            raise CherryError(
                f"recurrence.random_loops {list(self.random_loops)} must be [least, most] "
                f"within 1 to {self.loops} loops"
            )

    @property
    def parsed(self) -> Pattern:
        return parse(self.pattern)

    def is_cut(self, visit: Visit) -> bool:
        """Whether a layer's walk lies before the last `backprop_loops` loops, which alone carry the gradient."""
        last = self.backprop_loops
        return last is not None and visit.loop is not None and visit.loop < self.loops - last

    @property
    def further_loops(self) -> str | None:
        """In words, what loops beyond those of the pattern use, if weights are of each loop (see loops.py)."""
        stored = self.parsed.loops
        of_loops = {"vectors": self.loop_scales, "corrections": self.loop_rank, "routers": self.loop_routers}
        kinds = " and ".join(kind for kind, there in of_loops.items() if there)
        if not kinds or self.loops <= stored:
            return None
        return f"loops above {stored} use the {kinds} of loop {stored}"

    @property
    def output_scale(self) -> float:
        """What initial weights of output projections are scaled by: 1 / sqrt(effective sublayers)."""
        visits = unroll(self.parsed, self.parsed.loops, self.order)
        return sum(len(self.parsed.layers[visit.layer]) for visit in visits) ** -0.5


@dataclass(frozen=True)
class MultiToken:
    """Multi-token prediction, see multi_token.py.

    Attributes:
        depths: how many tokens after the next one are predicted, each by a layer of its own; 0 for none.
        weight: of the mean of their losses, beside the loss of the next token (Megatron's default).
    """

    depths: int = 0
    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.depths < 0:
            raise CherryError(f"mtp.depths is {self.depths}; use a positive number, or 0 for none")
        if not 0 < self.weight < float("inf"):
            raise CherryError(
                f"mtp.weight {self.weight} must be a finite number above 0; to go without: mtp.depths 0"
            )


FIRST_LOGITS = 0.1  # spread of a mixture's initial logits: gates begin nearly, but not exactly, even


@dataclass(frozen=True)
class Mixture:
    """A mixture of whole recurrent models, see mixture.py.

    Attributes:
        experts: how many models, all with the recurrence and the sizes of the configuration.
        top_k: how many of them see a sequence; 0 takes all.
        prefix: tokens at a sequence's beginning that decide which ones. Targets inside it carry no loss.
        router_hidden: width of the router.
        balance: weight of the loss that keeps the choices even; without effect where every expert is chosen.
        capacity: how many sequences of a global batch an expert takes at most, as a multiple of its even share.
    """

    experts: int
    top_k: int = 0
    prefix: int = 64
    router_hidden: int = 64
    balance: float = 0.01
    capacity: float = 1.25

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise CherryError(f"moee.experts is {self.experts}; a mixture has 2 or more, so take the section out")
        if self.top_k == 0:
            object.__setattr__(self, "top_k", self.experts)
        if not 1 <= self.top_k <= self.experts:
            raise CherryError(f"moee.top_k {self.top_k} is not from 1 to the {self.experts} of moee.experts")
        for name, value in (("prefix", self.prefix), ("router_hidden", self.router_hidden)):
            if value < 1:
                raise CherryError(f"moee.{name} is {value}; use a positive number")
        if not 0 <= self.balance < float("inf"):
            raise CherryError(f"moee.balance {self.balance} must be a finite number that is not negative")
        if not 1 <= self.capacity < float("inf"):
            raise CherryError(
                f"moee.capacity {self.capacity} leaves no room for all sequences; use 1 or more, e.g. 1.25"
            )

    @property
    def routes(self) -> bool:
        """Whether sequences go to some of the experts only."""
        return self.top_k < self.experts

    def router(self, vocabulary: int) -> dict[str, tuple[tuple[int, int], float]]:
        """The router's weights by name: shape, and standard deviation at the start."""
        r = self.router_hidden
        return {
            "embedding": ((vocabulary, r), 1.0),
            "inner": ((r, 2 * r), (2 * r) ** -0.5),
            "outer": ((self.experts, r), FIRST_LOGITS * r**-0.5),
        }


def room(rows: int, experts: int, top_k: int, capacity: float) -> int:
    """How many of a global batch's rows an expert takes at most."""
    share = capacity * top_k * rows / experts
    return min(rows, math.ceil(share - 1e-9))  # 1.05 and the like are a little more than they say
