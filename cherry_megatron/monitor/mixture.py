"""What steps.jsonl keeps of a mixture, and the alarm when an expert is left out."""

from typing import Any

TAGS = "cherry/moee/"
LEFT_OUT = 0.1  # of an even share


class MixtureWatch:
    """Collects what Megatron reports of a mixture, step by step. Of a single model it keeps nothing."""

    def __init__(self) -> None:
        self._shares: list[dict[str, float]] = []  # responsibility of each expert, by step

    def step_ended(self, heard: dict[str, float]) -> dict[str, Any]:
        """Take the tags of a step.

        Returns:
            What its line in steps.jsonl says of the mixture: `moee`, by the tag's name.
        """
        found = {
            tag.removeprefix(TAGS): value
            for tag, value in heard.items()
            if tag.startswith(TAGS) and "validation" not in tag and " vs " not in tag
        }
        if not found:
            return {}
        start = "responsibility/"
        self._shares.append({n.removeprefix(start): v for n, v in found.items() if n.startswith(start)})
        return {"moee": found}

    def alarms(self) -> list[str]:
        """A line for each expert that had next to nothing in every step since the last call."""
        steps, self._shares = self._shares, []
        if not steps:
            return []
        limit = LEFT_OUT / len(steps[0])
        return [
            f"expert {expert} is left out: responsible for less than {limit:.1%} of the tokens in each of the last "
            f"{len(steps)} steps; raise moee.balance, or moee.top_k"
            for expert in steps[0]
            if all(shares[expert] < limit for shares in steps)
        ]
