"""Multi-token prediction in surgery: layers that a checkpoint has are taken over, those that it lacks are drawn."""

from cherry_megatron.model.pattern import AHEAD
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.layers import DEPTH_NORMS, DEPTHS, EMBEDDING, JOIN, ROLES, Source, inner_prefix
from cherry_megatron.surgery.jobs import Constant, Drawn, Normal
from cherry_megatron.surgery.writing import Job, Spec


def new_depths(
    source: Checkpoint, layers: Source, depths: int, std: float, output_std: float, seed: int
) -> list[Job]:
    """The jobs that draw the depths which a checkpoint lacks, as training draws initial weights.

    Args:
        source: it.
        layers: its layers, the first of which is of the shape that depths have.
        depths: how many there are to be.
        std, output_std: standard deviation of initial weights, and of those of output projections.
        seed: weights depend on it and the tensor's name.
    """
    embedding = source.tensors[layers.top[EMBEDDING]]
    dtype, hidden = embedding.dtype, embedding.shape[1]
    jobs: list[Job] = []
    for number in range(layers.depths, depths):
        start = f"{DEPTHS}{number}."
        jobs.append(Constant(tuple(Spec(start + norm, dtype, (hidden,)) for norm in DEPTH_NORMS), 1.0))
        jobs.append(Normal((Spec(start + JOIN, dtype, (hidden, 2 * hidden)),), (std,), seed))
        for place, (symbol, like) in enumerate(zip(AHEAD, layers.layers[0], strict=True)):
            prefix = start + inner_prefix(place)
            shapes = {role: source.tensors[like.names[role]].shape for role in ROLES[symbol]}
            writes = tuple(Spec(prefix + role, dtype, shape) for role, shape in shapes.items())
            jobs.append(Drawn(writes, std, output_std, seed))
    return jobs
