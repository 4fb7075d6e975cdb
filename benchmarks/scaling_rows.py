"""What scaling.py measures: trainings by group and layout."""

from dataclasses import replace

from planner_fit import Training
from pretraining import GRAPH

EACH = 8  # sequences a step and GPU
MICRO_BATCHES = 32  # of a step over pipeline stages, which are idle at its beginning and end
ALONE = "one GPU"
SINGLE, TWIN, STOCK = "cherry_227m", "its untied twin, 34 layers", "stock Megatron, 34 layers"
MIXTURE, LAYERS = "CHERRY-1.8B, 8 experts, 2 see a sequence", "layers of 8 experts, 2 a token"
BALANCED = "megatron.moe-router-force-load-balancing=true"
_UNTIED = "recurrence.pattern=(*-)x34"
# The configurations that stand for those of full width, on a CPU.
_TINY = {
    "cherry_227m": ("cherry_tiny",),
    "base_1b": ("tiny_base",),
    "cherry_1p8b": ("tiny_moee",),
    "layers_227m": ("cherry_tiny", "recurrence.pattern=*-[(*E)x4]x3*-", "megatron.num-experts=8"),
}


def groups(count: int) -> dict[str, dict[str, Training]]:
    """Trainings by group and name; of each group the first is alone on its GPU, and the others are on `count`.

    Those of stock Megatron are the twin's, which another program trains.
    """
    graph = Training("cherry_227m", (_micro(8),), GRAPH, sequences=EACH)
    twin = _over(count, "cherry_227m", 4, _UNTIED)
    return {
        SINGLE: _over(count, "cherry_227m", 4),
        f"{SINGLE}, one CUDA graph": {ALONE: graph, f"DP={count}": _wide(graph, count)},
        TWIN: twin,
        STOCK: twin,
        "base_1b": _over(count, "base_1b", 2),
        **_experts(count),
    }


def _over(count: int, configuration: str, micro_batch: int, *overrides: str) -> dict[str, Training]:
    """A single model alone, and by the ways to lay it out over so many GPUs."""
    alone = Training(configuration, (_micro(micro_batch), *overrides), sequences=EACH)
    apart = ("megatron.overlap-grad-reduce=false", "megatron.overlap-param-gather=false")
    found = {ALONE: alone, f"DP={count}": _wide(alone, count)}
    found[f"DP={count}, no overlap"] = _wide(alone, count, *apart)
    for tensor, pipeline in ((2, 1), (1, 2), (1, 4), (2, 2)):
        if count % (tensor * pipeline) == 0:
            data = count // (tensor * pipeline)
            sizes = {"TP": tensor, "PP": pipeline, "DP": data}
            more = ["megatron.sequence-parallel=true"] if tensor > 1 else []
            more += [f"megatron.tensor-model-parallel-size={tensor}"]
            more += [f"megatron.pipeline-model-parallel-size={pipeline}"]
            laid_out = _wide(alone, count, *more)
            if pipeline > 1:
                laid_out = replace(laid_out, sequences=MICRO_BATCHES * micro_batch * data)
            found[" x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)] = laid_out
    return found


def _experts(count: int) -> dict[str, dict[str, Training]]:
    shared = f"megatron.expert-model-parallel-size={count}"
    pair = ("moee.experts=2", "moee.top_k=0", "megatron.expert-model-parallel-size=1")
    mixture = Training("cherry_1p8b", ("moee.experts=8",), sequences=EACH)
    layers = Training("layers_227m", (_micro(1),), sequences=EACH)
    balanced, learned = f"EP={count}, balance forced", f"EP={count}, learned"
    return {
        MIXTURE: {
            "two experts, both see all, one GPU": Training("cherry_1p8b", (_micro(1), *pair), sequences=EACH),
            balanced: _wide(mixture, count, shared, BALANCED),
            learned: _wide(mixture, count, shared),
        },
        LAYERS: {
            "one GPU, balance forced": replace(layers, overrides=(*layers.overrides, BALANCED)),
            balanced: _wide(layers, count, shared, BALANCED),
            learned: _wide(layers, count, shared),
        },
    }


def _wide(training: Training, count: int, *more: str) -> Training:
    """On so many GPUs, with as many sequences for each."""
    return replace(
        training, overrides=(*training.overrides, *more), ranks=count, sequences=training.sequences * count
    )


def _micro(sequences: int) -> str:
    return f"megatron.micro-batch-size={sequences}"


def exchanging(count: int) -> list[tuple[str, str]]:
    """Group and name of the trainings whose exchange is looked at."""
    data, experts = f"DP={count}", f"EP={count}, balance forced"
    return [(SINGLE, data), (TWIN, data), (MIXTURE, experts), (LAYERS, experts)]


def tiny(training: Training) -> Training:
    """The same layout for a CPU, where there are no graphs: a small model, a short sequence for each rank."""
    configuration, *more = _TINY[training.configuration]
    prefix = ["moee.prefix=8"] if training.configuration == "cherry_1p8b" else []
    short = ("megatron.seq-length=32", "megatron.max-position-embeddings=32", _micro(1), "evaluation.batches=1")
    overrides = (*more, *training.overrides, *prefix, *short)
    return replace(training, configuration=configuration, overrides=overrides, flags="", sequences=training.ranks)
