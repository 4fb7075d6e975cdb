"""What the section `generation` of a configuration says."""

from dataclasses import dataclass

from cherry_megatron.errors import CherryError


@dataclass(frozen=True)
class Generation:
    """What is generated at each evaluation, see monitor/generation.py.

    Attributes:
        prompts: a UTF-8 file with one prompt a line.
        tokens: at most so many follow each.
        temperature: of the distribution that they are drawn from; 0 takes the likeliest.
        top_k: draw from so many of the likeliest; 0 for all.
        top_p: of these draw from the fewest likeliest that have this share together; 1 for all.
    """

    prompts: str
    tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise CherryError(f"generation.tokens {self.tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise CherryError(f"generation.temperature {self.temperature} must be a finite number of 0 or more")
        if self.top_k < 0:
            raise CherryError(f"generation.top_k {self.top_k} must not be negative; 0 draws from all tokens")
        if not 0 < self.top_p <= 1:
            raise CherryError(
                f"generation.top_p {self.top_p} must be more than 0 and at most 1; 1 draws from all tokens"
            )
