"""Micro-batches by NVIDIA DALI: those of the torch loader, bit for bit.

What is read from disk is handed over as small as it is, four bytes a token and one a mark, ahead of the step that
needs it. The 64-bit ids, masks and positions are made of it in DALI's pipeline, on the GPU where there is one.

Which samples a micro-batch has stays Megatron's to say: its sampler counts samples over all ranks, from where the
checkpoint stopped. DALI's own counting would tie a resume to the number of ranks and the size of the micro-batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor
from torch import Tensor

from cherry_megatron.data.dataset import MarkedDataset
from cherry_megatron.data.marks import ANSWERS

AHEAD = 2  # micro-batches that wait


class DaliLoader:
    """Reads what a DataLoader would, without its processes.

    Args:
        loader: DataLoader as Megatron builds it, of a MarkedDataset or a blend of them; its order of samples is
            used, and it is never iterated itself.
    """

    def __init__(self, loader: Any) -> None:
        self._dataset, self._sampler = loader.dataset, loader.batch_sampler
        blended = isinstance(self._dataset, BlendedDataset)
        parts: list[MarkedDataset] = self._dataset.datasets if blended else [self._dataset]
        self._first = parts[0]  # all of a blend have one configuration and one tokenizer
        self._marks = sorted({name for part in parts for name in part.marks})

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Micro-batches as the torch loader gives them: tensors [b, s] by name, on the GPU if there is one."""
        on_gpu = torch.cuda.is_available()
        pipeline, names = self._pipeline(torch.cuda.current_device() if on_gpu else None)
        while True:
            try:
                # On a GPU it is there for what the current stream does next; nothing waits.
                found = pipeline.run(torch.cuda.current_stream() if on_gpu else None)
            except StopIteration:
                return
            # Copied: a step keeps all of its micro-batches, and DALI uses its memory again.
            yield {
                name: to_torch_tensor(rows.as_tensor(), copy=True) for name, rows in zip(names, found, strict=True)
            }

    def _stored(self) -> Iterator[list[np.ndarray[Any, Any]]]:
        """Of each micro-batch tokens [b, s + 1] int32, and of each kind of marks the same uint8."""
        for batch in self._sampler:
            samples = [self._sample(index) for index in batch]
            rows = [np.stack([row[0] for row in samples], dtype=np.int32, casting="same_kind")]
            for place in range(1, 1 + len(self._marks)):
                rows.append(np.stack([row[place] for row in samples], dtype=np.uint8, casting="unsafe"))
            yield rows

    def _sample(self, index: int) -> list[np.ndarray[Any, Any]]:
        if not isinstance(self._dataset, BlendedDataset):
            return self._first.stored(index, self._marks)
        part = self._dataset.datasets[self._dataset.dataset_index[index]]
        return part.stored(self._dataset.dataset_sample_index[index], self._marks)

    def _pipeline(self, device: int | None) -> tuple[Pipeline, list[str]]:
        """What makes micro-batches, and the names of its outputs; see MarkedDataset for what they are."""
        config, pad = self._first.config, self._first._pad_token_id
        length = config.sequence_length
        pipeline = Pipeline(
            batch_size=self._sampler.micro_batch_size, num_threads=1, device_id=device, prefetch_queue_depth=AHEAD
        )

        def there(node: Any) -> Any:
            return node if device is None else node.gpu()

        def of_type(node: Any, dtype: types.DALIDataType) -> Any:
            return fn.cast(node, dtype=dtype)

        with pipeline:
            stored = fn.external_source(
                source=self._stored(),
                num_outputs=1 + len(self._marks),
                dtype=[types.INT32, *[types.UINT8] * len(self._marks)],
                ndim=1,
            )
            text, *rest = [there(node) for node in stored]
            marks = {name: of_type(node[1:], types.FLOAT) for name, node in zip(self._marks, rest, strict=True)}
            tokens, labels = text[:length], text[1:]
            loss_mask = of_type(labels != pad, types.FLOAT)
            if config.eod_mask_loss:
                loss_mask *= of_type(tokens != config.tokenizer.eod, types.FLOAT)
            if ANSWERS in marks:
                loss_mask *= marks[ANSWERS]
            if config.context > 1:
                counts = [float(place >= config.context - 1) for place in range(length)]
                loss_mask *= there(fn.constant(fdata=counts, shape=[length]))
            positions = there(fn.constant(idata=list(range(length)), shape=[length]))
            made = {
                "tokens": of_type(tokens * (tokens != pad), types.INT64),
                "labels": of_type(labels * (labels != pad), types.INT64),
                "loss_mask": loss_mask,
                "position_ids": of_type(positions, types.INT64),
            }
            if config.selection is not None:
                made["selected"] = marks[config.selection]
            pipeline.set_outputs(*made.values())
        return pipeline, list(made)
