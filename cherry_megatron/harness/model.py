"""The model that the harness asks: a checkpoint of this project under its layout; registered as `cherry`.

Every rank is asked everything and gets all answers; the work is shared out in inference/scoring.py and generate.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from megatron.training import get_args
from tqdm import tqdm

from cherry_megatron.config import Config, load
from cherry_megatron.errors import CherryError
from cherry_megatron.evaluate import with_loops
from cherry_megatron.inference.generate import generate
from cherry_megatron.inference.mixture import readers
from cherry_megatron.inference.options import Generation
from cherry_megatron.inference.prompts import Prompts, encode_prompts
from cherry_megatron.inference.rows import Row
from cherry_megatron.inference.scoring import Pair, Score, score
from cherry_megatron.platform.machine import prepare
from cherry_megatron.pretrain import load_only, pretrain
from cherry_megatron.section_rules import check_generation

DRAWS_SEED = 0


@register_model("cherry")
class CherryLM(TemplateLM):
    """A model under its parallel layout, as the harness' interface has it.

    Tokens, windows and cuts are those of the harness' own `hf` model, so that the same weights get the same scores.

    Attributes:
        cut: requests whose beginning was left out because they are longer than a sequence.

    Args:
        model: chunks of this rank.
        texts: has the tokenizer.
        loops: how often the core is walked.
        terminal: where a bar shows the progress, if it is one; None for nowhere.
    """

    def __init__(
        self, model: list[torch.nn.Module], texts: Prompts, loops: int, terminal: TextIO | None = None
    ) -> None:
        super().__init__()
        self._model, self._texts, self._loops, self._terminal = model, texts, loops, terminal
        self.cut = 0

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "CherryLM":
        """`config=FILE,loops=4`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "CherryLM":
        """Open the checkpoint that a configuration names, as `lm_eval.simple_evaluate(model="cherry", ...)` asks.

        Args:
            arg_dict: config, a file; loops, if not the model's.
            additional_config: batch size and device of the harness, which the configuration says here.

        Raises:
            CherryError: as `cherry evaluate`.
        """
        machine = prepare()
        config = load(Path(arg_dict["config"]), (), ())
        texts, loops = readable(config), int(arg_dict.get("loops") or config.recurrence.loops)
        opened: list[list[torch.nn.Module]] = []
        config = replace(with_loops(config, loops), generation=None)
        pretrain(config, machine, load_only(config), evaluation=lambda *_: opened.append)
        return cls(opened[0], texts, loops)

    @property
    def eot_token_id(self) -> int:
        return self._texts.end

    @property
    def max_length(self) -> int:
        """Tokens that the model may read at once."""
        return int(get_args().seq_length)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self._texts.tokenizer.encode(string, add_special_tokens=False).ids
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """log p of each continuation after its context, and whether it is the greedy one."""
        found: list[Score] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Score]:
        longest = self.max_length + 1  # the last token is not read
        pairs: list[Pair] = []
        for texts, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise CherryError(
                    f"a task asks for a continuation of {len(continuation)} tokens ({_beginning(texts)}), and this "
                    f"model takes 1 to {self.max_length} (megatron.seq-length) that do not merge with the context; "
                    "leave the task out"
                )
            room = longest - len(continuation)
            self.cut += len(context) > room
            pairs.append((context[-room:], continuation))
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """log p of each text after the end of a document, in windows of a sequence that predict each token once."""
        windows: list[Pair] = []
        counts = []
        for (text,) in [request.args for request in requests]:
            tokens = self.tok_encode(text)
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += map(make_disjoint_window, cut)
            counts.append(len(windows))
        totals = [total for total, _ in self._score(windows)]
        return [sum(totals[start:end]) for start, end in zip([0, *counts], counts, strict=False)]

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        with self._bar(len(pairs)) as bar:
            return score(self._model, pairs, self._loops, bar.update)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What follows each context, up to the first of its `until` and without it."""
        alike = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        found: dict[int, str] = {}
        with self._bar(len(requests)) as bar:
            for numbers in alike.values():
                asked = normalize_gen_kwargs(requests[numbers[0]].args[1])
                prompts = {number: self._prompt(requests[number].args[0], asked) for number in numbers}
                numbers.sort(key=lambda number: len(prompts[number]), reverse=True)
                while numbers:
                    now = numbers[: self._at_once(len(prompts[numbers[0]]) + asked["max_gen_toks"])]
                    del numbers[: len(now)]
                    texts = self._continue([prompts[number] for number in now], asked)
                    found |= dict(zip(now, texts, strict=True))
                    bar.update(len(now))
        return [found[number] for number in range(len(requests))]

    def _prompt(self, text: str, asked: dict[str, Any]) -> list[int]:
        """The last tokens of a context, which leave room for what follows."""
        room = self.max_length - asked["max_gen_toks"]
        if room < 1:
            raise CherryError(
                f"a task asks for {asked['max_gen_toks']} new tokens, too many for megatron.seq-length "
                f"{self.max_length}; set max_gen_toks in its generation_kwargs, or leave the task out"
            )
        tokens = self.tok_encode(text) or [self.eot_token_id]
        self.cut += len(tokens) > room
        return tokens[-room:]

    def _at_once(self, longest: int) -> int:
        """Prompts of a batch: of those of a replica no more tokens are kept than a micro-batch of training has."""
        args, (_, replicas) = get_args(), readers(self._model)
        return max(args.micro_batch_size * args.seq_length // longest, 1) * replicas.size()

    def _continue(self, prompts: list[list[int]], asked: dict[str, Any]) -> list[str]:
        stops = handle_stop_sequences(list(asked["until"]), eos=None)

        def heard(row: Row) -> None:
            if any(stop in self._decode(row.new) for stop in stops if stop):
                row.stop()

        options = Generation(
            "the task",
            tokens=asked["max_gen_toks"],
            temperature=asked.get("temperature") or 0.0,
            top_k=asked.get("top_k") or 0,
            top_p=asked.get("top_p") or 1.0,
        )
        end = self.eot_token_id
        generated = generate(self._model, prompts, options, self._loops, DRAWS_SEED, end, heard=heard)
        return [_up_to(self._decode(tokens), stops) for tokens in generated.texts]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._texts.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, unit="item", file=self._terminal, disable=None if self._terminal else True)


def readable(config: Config) -> Prompts:
    """The tokenizer of a model that can be asked.

    Raises:
        CherryError: if it cannot, or has none.
    """
    check_generation(config)
    return encode_prompts(config, [], 1, "--tasks")


def _up_to(text: str, stops: Sequence[str]) -> str:
    """A text before the first of some sequences, one after the other as the harness cuts."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text


def _beginning(texts: tuple[str, str] | None) -> str:
    return "a window of a text" if texts is None else repr(texts[1][:40])
