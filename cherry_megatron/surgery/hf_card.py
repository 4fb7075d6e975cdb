"""The model card: what a model is, where it comes from, what was measured of it, and how it is loaded."""

from collections.abc import Iterator
from typing import Any

from cherry_megatron.runs import read_evaluations
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.lineage import chain, read_lineage
from cherry_megatron.surgery.hf_form import Form

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}")
found = model.generate(**tokenizer("...", return_tensors="pt"), max_new_tokens=64{loops})
print(tokenizer.decode(found[0]))
```"""


def card(name: str, form: Form, dtype: str, parameters: int, source: Checkpoint) -> str:
    """The content of README.md.

    Args:
        name: of the model.
        form: what it is.
        dtype: of its weights.
        parameters: that are stored.
        source: the checkpoint that it is made of.
    """
    return "\n".join(
        [
            "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [cherry]", "---", "",
            f"# {name}", "", *_what(form), "", "| | |", "|---|---|", *_sizes(form, dtype, parameters), "",
            "## Loading", "", _loading(name, form), "",
            "## Measured", "", *_measured(source), "",
            "## Lineage", "", *_lineage(source), "",
        ]
    )  # fmt: skip


def _what(form: Form) -> Iterator[str]:
    yield (
        "A CHERRY language model ([arXiv 2606.31796](https://arxiv.org/abs/2606.31796)), converted by `cherry "
        "convert-hf` of cherry_megatron."
    )
    if form.kind == "llama":
        yield "It has no loops and is a plain Llama model: whatever loads these loads it, without code of its own."
    else:
        yield "Its code lies beside the weights, so `trust_remote_code=True` is needed: read it first."
    if form.moee is not None:
        yield (
            "What is returned as logits are logarithms of probabilities. Which models read a text is chosen by its "
            f"first {form.moee.prefix} tokens; these carry no loss as labels."
        )


def _sizes(form: Form, dtype: str, parameters: int) -> Iterator[str]:
    recurrence, shape, pattern = form.recurrence, form.shape, form.recurrence.parsed
    effective = pattern.effective(recurrence.loops)
    yield f"| parameters | {parameters:,}, {dtype} |"
    if form.moee is not None:
        yield f"| models | {form.moee.experts}, of which {form.moee.top_k} read a text |"
    yield f"| stored layers | {len(pattern.layers)} |"
    if recurrence.loops > 1:
        how = f"`{recurrence.pattern}`, {recurrence.loops} loops, order {recurrence.order}"
        yield f"| effective layers | {effective}: {how} |"
    yield f"| hidden size, MLP | {shape.hidden}, {shape.ffn} |"
    yield f"| heads, key-value heads, channels | {shape.heads}, {shape.groups}, {shape.head_size} |"
    if shape.experts:
        yield f"| experts inside layers | {shape.experts}, top {shape.top_k} |"
    if form.depths:
        yield f"| depths of multi-token prediction | {form.depths} (`predict_ahead`; `generate` does without) |"
    tied = ", one matrix for embedding and output" if shape.tied else ""
    yield f"| vocabulary, padding included | {form.words}{tied} |"
    yield f"| positions | {form.longest} |"


def _loading(name: str, form: Form) -> str:
    loops = form.recurrence.loops
    trust = "" if form.kind == "llama" else ", trust_remote_code=True"
    text = _LOAD.format(name=name, trust=trust, loops=f", loops={loops}" if loops > 1 else "")
    if loops == 1:
        return text
    return f"{text}\n\n`loops` may be any number from 1; the default is {loops}, with which it was made."


def _measured(source: Checkpoint) -> list[str]:
    """Held-out losses that the training has recorded at this very checkpoint."""
    found = _evaluation(source)
    if found is None:
        return ["No evaluation of this checkpoint is recorded."]
    step, losses = found
    rows = [f"| {loops} | {loss:.4f} |" for loops, loss in sorted(losses.items(), key=lambda pair: int(pair[0]))]
    return [
        f"Held-out loss in nats a token, of the training's own validation text, at step {step}:", "",
        "| loops | loss |", "|---|---|", *rows,
    ]  # fmt: skip


def _evaluation(source: Checkpoint) -> tuple[int, dict[str, float]] | None:
    run, step = source.folder.parent.parent, source.folder.name.removeprefix("iter_")
    if (
        source.folder.parent.name != "checkpoints"
        or not (run / "evaluations.jsonl").is_file()
        or not step.isdecimal()
    ):
        return None
    losses = next((e["losses"] for e in read_evaluations(run) if e["iteration"] == int(step)), None)
    return (int(step), losses) if losses else None


def _lineage(source: Checkpoint) -> list[str]:
    """The operations that led to it, without the places on the machine where they did."""
    record = read_lineage(source.folder)
    if record is None:
        return ["The checkpoint had no record of what it was made from."]
    lines = [f"{'  ' * depth}{_told(entry)}" for depth, entry in chain(record)]
    return ["Newest first, each by its identity; `lineage.json` has the whole.", "", "```", *lines, "```"]


def _told(entry: dict[str, Any]) -> str:
    made = f"{entry.get('role', '')} {entry['operation']}".lstrip()
    step = f" step {entry['iteration']}" if "iteration" in entry else ""
    commit = str(entry.get("git", {}).get("commit", "unknown"))[:10]
    return f"{entry['identity'][:12]}  {made}{step}  {entry.get('time', 'at an unknown time')}  code {commit}"
