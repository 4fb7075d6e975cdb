"""Megatron's GPTDataset over the indexed tokens, and one micro-batch on every rank that needs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from cherry_megatron.data.dataset import MarkedDataset, MarkedDatasetConfig
from cherry_megatron.data.shuffle import Shuffle
from cherry_megatron.files import cannot_write

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
SELECTED = "selected"
EXPERTS = "experts"
Rows = list[dict[str, Tensor]] | None  # the micro-batches of a step; None on ranks that read no data


HELD_OUT_SEED = 1234


def build_datasets(
    samples: tuple[int, int, int], selection: str | None = None, shuffle: Shuffle = "none", context: int = 0
) -> tuple[Any, Any, Any]:
    """The train, validation and test split, packed to --seq-length. Every rank must call it.

    Args:
        samples: how many sequences of each split are wanted.
        selection: name of the marks to give with each sample.
        shuffle: what to permute within documents, see shuffle.py.
        context: tokens at a sequence's beginning that carry no loss as targets.
    """
    config = _config(get_args().seed, selection, shuffle, context)
    return _built(list(samples), config)


def build_held_out(samples: int, selection: str | None = None, shuffle: Shuffle = "none", context: int = 0) -> Any:
    """So many sequences of the validation split, the same ones for every seed, schedule and length of training."""
    config = _config(HELD_OUT_SEED, selection, shuffle, context)
    if config.split_matrix is not None:
        config.split_matrix = [None, config.split_matrix[1], None]
    if config.blend_per_split is not None:
        config.blend_per_split = [None, config.blend_per_split[1], None]
    return _built([0, samples, 0], config)[1]


def _built(samples: list[int], config: MarkedDatasetConfig) -> tuple[Any, Any, Any]:
    try:
        found: tuple[Any, Any, Any] = BlendedMegatronDatasetBuilder(
            MarkedDataset, samples, _reads_data, config
        ).build()
    except Exception as error:
        if isinstance(error.__cause__, OSError):  # Megatron says that it cannot write, not where or why
            raise cannot_write(Path(str(config.path_to_cache)), error.__cause__) from None
        raise
    return found


def _config(seed: int, selection: str | None, shuffle: Shuffle, context: int) -> MarkedDatasetConfig:
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return MarkedDatasetConfig(
        random_seed=seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        selection=selection,
        shuffle=shuffle,
        context=context,
    )


def _reads_data() -> bool:
    first_or_last = mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()
    return first_or_last and mpu.get_tensor_model_parallel_rank() == 0


def next_batch(
    iterator: Iterator[dict[str, Tensor]] | None,
    micro_batch_size: int,
    last_reads_tokens: bool = False,
    has_selection: bool = False,
    experts: int = 0,
) -> dict[str, Tensor | None]:
    """One micro-batch of `micro_batch_size` sequences.

    Args:
        iterator: this rank's data; None on ranks that read none.
        micro_batch_size: sequences.
        last_reads_tokens: give tokens and position_ids to the last stage too, where a teacher lives.
        has_selection: the data says which targets are selected.
        experts: so many experts, and the data says which ones see a sequence; 0 if it does not.

    Returns:
        tokens, position_ids [b, s] on the first pipeline stage, labels, loss_mask, selected [b, s] and experts
        [b, experts] on the last, None elsewhere; equal on all tensor-parallel ranks.
    """
    args = get_args()
    if not (mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()):
        return dict.fromkeys((*KEYS, SELECTED, EXPERTS))
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None, "this rank reads data, but was given no iterator"
        row = next(iterator)
        device = torch.cuda.current_device()
        marked = (SELECTED,) * has_selection + (EXPERTS,) * bool(experts)
        wanted = (*KEYS, *marked) if mpu.is_pipeline_last_stage() else KEYS
        batch = {key: row[key].to(device, non_blocking=True) for key in wanted}
        batch["attention_mask"] = None
    found: dict[str, Tensor | None] = get_batch_on_this_tp_rank(
        dict(batch),  # Megatron empties what this stage does not need
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    found[SELECTED] = found[EXPERTS] = None
    if mpu.is_pipeline_last_stage():
        further = ("tokens", "position_ids") if last_reads_tokens and not mpu.is_pipeline_first_stage() else ()
        for key in (*further, SELECTED) if has_selection else further:
            found[key] = _broadcast(batch.get(key), found["loss_mask" if key == SELECTED else "labels"])
        if experts:
            found[EXPERTS] = _broadcast(batch.get(EXPERTS), torch.empty(micro_batch_size, experts, device="cuda"))
    return found


def _broadcast(ours: Tensor | None, like: Tensor | None) -> Tensor:
    """What the first tensor-parallel rank has, on all of them."""
    assert like is not None
    wanted = torch.empty_like(like) if ours is None else ours
    group = mpu.get_tensor_model_parallel_group()
    torch.distributed.broadcast(wanted, mpu.get_tensor_model_parallel_src_rank(), group=group)
    return wanted
