"""Distillation: the student learns from a teacher's next-token probabilities beside the text.

    loss = (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student)

with both distributions at the temperature (Hinton et al. 2015, arXiv 1503.02531). The teacher lives whole on the
ranks of the last pipeline stage, with the student's tensor-parallel size; its checkpoint may have been saved under
any layout. A mixture's experts are compared one by one, see model/mixture.py.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.arguments import core_transformer_config_from_args
from torch import Tensor

from cherry_megatron.config import Config, Distillation, load
from cherry_megatron.data.tokenizer import fingerprint
from cherry_megatron.errors import CherryError, naming
from cherry_megatron.model.build import build_model, prepare_config
from cherry_megatron.model.mixture import mixture_of
from cherry_megatron.model.plan import make_plan
from cherry_megatron.shares import shares
from cherry_megatron.storage.checkpoint import Checkpoint, open_checkpoint
from cherry_megatron.storage.fits import check_model
from cherry_megatron.storage.trained import FUNCTION, tokenizer_of, told_tokenizer


class Teacher:
    """Watches the student's logits and keeps their divergence from its own.

    Every rank must make one; it holds a model on the last pipeline stage alone.

    Args:
        options: which teacher, and how it counts.
        student: the configuration that is trained.
        args: Megatron's arguments of the student.

    Attributes:
        weight: of the divergence in the loss.
        divergence: of the last micro-batch, [b, s], until it is taken; None on other stages than the last.
    """

    def __init__(self, options: Distillation, student: Config, args: Any) -> None:
        self.weight, self._temperature = options.weight, options.temperature
        self.divergence: Tensor | None = None
        self._seen: Tensor | None = None  # logits of the teacher's pass until they are forgotten, [s, b, v/tp]
        self._logits: Tensor | None = None  # those that the student's next pass is compared with
        self._model: torch.nn.Module | None = None
        self._watched = False
        alone, _ = torch.distributed.new_subgroups(1)
        if mpu.is_pipeline_last_stage():
            self._model = _build(teacher_config(options, student), args, alone)
            with naming("distillation.load"):  # hashes are seen here, because only here all of it is read
                _load(self._model, open_checkpoint(Path(options.load)))
            self._model.requires_grad_(False).eval().to(torch.cuda.current_device())

    def see(self, student: torch.nn.Module, tokens: Tensor | None, position_ids: Tensor | None) -> None:
        """Get ready for the student's forward pass of a micro-batch; tokens, position_ids: [b, s].

        A mixture, whose ranks exchange their rows first, looks and expects by itself.
        """
        if self._model is None:
            return
        mixture = mixture_of(student)
        if not self._watched:
            for model in [student] if mixture is None else mixture.experts.values():
                get_attr_wrapped_model(model, "output_layer").register_forward_hook(self._compare)
            self._watched = True
        if mixture is not None:
            mixture.teacher = self
            return
        self.look(tokens, position_ids)
        self.expect()
        self.forget()

    def look(self, tokens: Tensor | None, position_ids: Tensor | None) -> None:
        """The teacher reads rows, [b, s]."""
        assert self._model is not None
        with torch.no_grad():
            # [b, s, v/tp]; the output layer's own are [s, b, v/tp].
            self._seen = self._model(tokens, position_ids, None).transpose(0, 1)

    def expect(self, rows: Tensor | None = None) -> None:
        """The next pass is over these of the rows that the teacher has read; None: over all."""
        assert self._seen is not None
        self._logits = self._seen if rows is None else self._seen[:, rows]

    def forget(self) -> None:
        """No further pass is over rows that the teacher has read: its logits are among the largest tensors here."""
        self._seen = None

    def take(self) -> Tensor:
        """The divergence of the rows of the last pass, [b, s]."""
        found, self.divergence = self.divergence, None
        assert found is not None
        return found

    def _compare(self, _module: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        """Before the cross-entropy, which overwrites the logits."""
        if self._logits is not None:
            group = mpu.get_tensor_model_parallel_group()
            divergence = Divergence.apply(output[0], self._logits, self._temperature, group)
            self._logits, self.divergence = None, divergence.transpose(0, 1)


class Divergence(torch.autograd.Function):
    """temperature^2 * KL(teacher || student) of each token, over a vocabulary that ranks share.

    Takes the student's and the teacher's logits, [..., v/tp]; gives [...] in nats.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: Any) -> Tensor:
        ours = _log_softmax(student.float() / temperature, group)
        theirs = _log_softmax(teacher.float() / temperature, group)
        total = (theirs.exp() * (theirs - ours)).sum(-1)
        torch.distributed.all_reduce(total, group=group)
        ctx.save_for_backward((ours.exp() - theirs.exp()).to(student.dtype))
        ctx.temperature = temperature
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        return (gradient.unsqueeze(-1) * ctx.temperature * difference).to(difference.dtype), None, None, None


def _log_softmax(logits: Tensor, group: Any) -> Tensor:
    largest = logits.max(-1, keepdim=True).values
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    total = (logits - largest).exp().sum(-1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return logits - largest - total.log()


def teacher_config(options: Distillation, student: Config) -> Config:
    """The teacher's configuration, with the layout and the batch of the student.

    Raises:
        CherryError: if it is none, or the two do not share a vocabulary.
    """
    same = ("tensor-model-parallel-size", "global-batch-size", "micro-batch-size", "seq-length")
    overrides = [f"megatron.{flag}={student.value(flag)}" for flag in same]
    overrides += [f"megatron.max-position-embeddings={student.value('max-position-embeddings')}"]
    with naming("distillation.config"):
        found = load(Path(options.config), [*overrides, "megatron.pipeline-model-parallel-size=1"])
        found.require_one_model("a teacher")
        found.require_no_experts("a teacher")
    if found.shape.vocabulary != student.shape.vocabulary:
        raise CherryError(
            f"distillation.config: {options.config} has a vocabulary of {found.shape.vocabulary}, the student one "
            f"of {student.shape.vocabulary}; both must read the same tokens"
        )
    return found


def check_teacher(options: Distillation, student: Config) -> None:
    """See that the teacher is what its configuration says, and that both read the same tokens.

    Raises:
        CherryError: naming the first thing that differs.
    """
    teacher = teacher_config(options, student)
    with naming("distillation.load"):
        source = open_checkpoint(Path(options.load))
        if source.experts:
            raise CherryError(
                f"{source.folder} is a mixture, and a teacher is one model; name one, such as "
                "`cherry assemble-moee --extract` makes of it"
            )
        source.check(list(source.model))
    with naming("distillation.config"):
        check_model(source, teacher.recurrence, teacher.source, teacher.all_flags)
    if student.value("tokenizer-type") == "HuggingFaceTokenizer" and student.value("tokenizer-model") is not None:
        ours, theirs = fingerprint(Path(student.value("tokenizer-model"))), tokenizer_of(source)
        if theirs not in (None, ours):
            raise CherryError(
                f"distillation.load: {source.folder} was trained with the tokenizer {told_tokenizer(source)}, "
                f"the student's is {student.value('tokenizer-model')} ({ours}); both must read the same tokens"
            )


def _build(teacher: Config, args: Any, alone: Any) -> torch.nn.Module:
    shape = teacher.shape
    args = copy.copy(args)
    args.hidden_size, args.ffn_hidden_size = shape.hidden, shape.ffn
    args.num_attention_heads, args.num_query_groups = shape.heads, shape.groups
    args.group_query_attention, args.kv_channels = shape.groups != shape.heads, shape.head_size
    args.swiglu = shape.gated
    for flag, (name, _) in FUNCTION.items():
        setattr(args, name, teacher.value(flag))
    args.num_layers = len(teacher.recurrence.parsed.symbols)
    args.pipeline_model_parallel_size, args.recompute_granularity, args.fp8 = 1, None, None
    args.mtp_num_layers = None  # a teacher's next token is what counts
    args.num_experts = args.moe_ffn_hidden_size = None  # a teacher has none, on whatever ranks the student's lie
    args.expert_model_parallel_size = 1
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = alone
    model = build_model(
        prepare_config(core_transformer_config_from_args(args), teacher.recurrence),
        teacher.recurrence,
        shape,
        make_plan(teacher.recurrence, shape, args.seq_length, 1),
        groups,
        sequence_length=args.max_position_embeddings,
        rotary_base=teacher.value("rotary-base"),
        seed=args.seed,
        pre_process=True,
        post_process=True,
    )
    return model.to(args.params_dtype)


def _load(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill this rank's share of every weight, without talking to other ranks.

    Raises:
        CherryError: if a weight is missing, has another shape, or is not what was saved.
    """
    for share in shares(model):
        found = checkpoint.tensors.get(share.key)
        if found is None or found.shape != share.shape:
            has = "none" if found is None else f"one of {list(found.shape)}"
            raise CherryError(
                f"{checkpoint.folder}: the teacher wants {share.key} of {list(share.shape)}, there is {has}"
            )
        share.fill(found.dtype, checkpoint.read(share.key)[share.cut])
