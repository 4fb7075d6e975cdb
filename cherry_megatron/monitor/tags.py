"""Names in TensorBoard, and the sections of what is reported besides losses: `cherry/SECTION/NAME`."""

OURS = "cherry/"  # how our own tags begin
HELD_OUT = f"{OURS}held-out-loss"  # with all loops, of the same batches each time
MOEE, MTP = f"{OURS}moee/", f"{OURS}mtp/"
_OF_EVALUATION = ("validation", "/held-out", " vs ")  # in tags that are not of the step: Megatron's and ours


def of_section(start: str, tags: dict[str, float]) -> dict[str, float]:
    """What stands under a section, such as MOEE, by the rest of its tag."""
    return {tag.removeprefix(start): value for tag, value in tags.items() if tag.startswith(start)}


def of_step(start: str, heard: dict[str, float]) -> dict[str, float]:
    """The same of a training step, without evaluations, and without means over nothing."""
    found = of_section(start, heard)
    return {n: v for n, v in found.items() if v == v and not any(words in n for words in _OF_EVALUATION)}
