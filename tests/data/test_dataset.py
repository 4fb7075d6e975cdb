"""Samples with their marks, against the positions of tokens that occur once: a label tells where it lies.

All that needs Megatron runs in children forked from a server that has imported it.
"""

import json
import pickle
import random
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cherry_megatron.data import marks as marked
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.shuffle import DocumentOrder, ShuffledDocuments
from cherry_megatron.errors import CherryError
from tests.conftest import run_ranks

END, PAD, FIRST = 0, 1, 2  # ids; FIRST + place of all that are no END


class Text:
    """An indexed data set of tokens that say where they lie, with marks drawn for each of them."""

    def __init__(self, prefix: Path, lengths: list[int], seed: int, names: tuple[str, ...]) -> None:
        self.prefix, self.lengths = prefix, np.array(lengths, np.int32)
        self.ends = np.cumsum(self.lengths)
        self.tokens = np.arange(FIRST, FIRST + self.ends[-1], dtype=np.int32)
        self.tokens[self.ends - 1] = END
        self.tokens.tofile(f"{prefix}.bin")
        self._index(np.int32)
        draw = random.Random(seed)
        self.marks = {name: np.array([draw.random() < 0.4 for _ in self.tokens], np.uint8) for name in names}
        for name, marks in self.marks.items():
            write(prefix, name, marks, self.lengths)

    def _index(self, dtype: Any) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder("/dev/null", dtype=dtype)
        builder.sequence_lengths = self.lengths
        builder.document_indices = np.arange(len(self.lengths) + 1)
        builder.finalize(f"{self.prefix}.idx")

    def place(self, token: int, before: int) -> int:
        """Of a target, and the token before it, in the file."""
        if token != END:
            return token - FIRST
        return int(self.ends[np.searchsorted(self.ends, before - FIRST, side="right")]) - 1


def write(prefix: Path, name: str, marks: np.ndarray, lengths: np.ndarray) -> None:
    said = marked.Marks(name, "hand", "1", len(marks), len(marks), int(marks.sum()), marked.fingerprint(prefix))
    marked.write_marks(prefix, said, lengths, np.array_split(marks, 3))


def build(cls: Any, prefix: Path, sequence: int, samples: int | None, split: str = "train", **options: Any) -> Any:
    """The data set of all documents but the last, or of all if there is one."""
    from megatron.core.datasets.utils import Split

    config = _config(cls, sequence, **options)
    tokens = cls.build_low_level_dataset(str(prefix), config)
    documents = np.arange(max(1, len(tokens) - 1), dtype=np.int32)
    return cls(tokens, str(prefix), documents, samples, Split[split], config)


def _config(cls: Any, sequence: int, **options: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from cherry_megatron.data.dataset import MarkedDatasetConfig

    tokenizer = SimpleNamespace(vocab_size=60000, pad=PAD, eod=END, eos=END, unique_identifiers={})
    return (GPTDatasetConfig if cls is GPTDataset else MarkedDatasetConfig)(
        **{
            "random_seed": 3, "sequence_length": sequence, "tokenizer": tokenizer, "split": "1",
            "blend": ([""], None),
            "reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False, **options,
        }
    )  # fmt: skip


texts = st.tuples(st.lists(st.integers(2, 12), min_size=1, max_size=8), st.integers(0, 1 << 30))
some = settings(max_examples=50, database=None, suppress_health_check=list(HealthCheck), deadline=None)


# Samples


def _marks_follow_their_targets() -> None:
    from cherry_megatron.data.dataset import MarkedDataset

    @some
    @given(texts, st.integers(1, 9), st.integers(1, 30), st.integers(0, 4), *[st.booleans()] * 4)
    def check(described, sequence, samples, context, shuffle, answers, mask_ends, whole):
        with tempfile.TemporaryDirectory() as scratch:
            names = ("picked", marked.ANSWERS) if answers else ("picked",)
            text = Text(Path(scratch) / "text", *described, names)
            dataset = build(
                MarkedDataset, text.prefix, sequence, None if whole else samples, "valid",
                selection="picked", shuffle="tokens" if shuffle else "none", eod_mask_loss=mask_ends,
                context=context, drop_last_partial_validation_sequence=False,
            )  # fmt: skip
            targets = text.ends[len(dataset.indices) - 1] * len(dataset.document_index) // len(dataset.indices) - 1
            for number in [*range(len(dataset)), None]:
                # Megatron keeps the mask of its first sample for all, also where that was padded.
                dataset.masks_and_position_ids_are_cached = False
                sample = dataset[number]
                assert sample["selected"].shape == (sequence,) and sample["selected"].dtype.is_floating_point
                real = targets - sequence * int(dataset.shuffle_index[number or 0])
                rows = zip(
                    *(sample[key].tolist() for key in ("tokens", "labels", "loss_mask", "selected")), strict=True
                )
                for step, (token, label, mask, selected) in enumerate(rows):
                    if step >= real:
                        assert (mask, selected) == (0, 0)
                        continue
                    place = text.place(label, token)
                    assert selected == text.marks["picked"][place]
                    counts = not answers or text.marks[marked.ANSWERS][place]
                    counts = counts and step + 1 >= context  # the target's place in the sample
                    assert mask == (number is not None and counts and not (mask_ends and token == END))

    check()


def test_marks_follow_their_targets(tmp_path):
    run_ranks(tmp_path, 1, _marks_follow_their_targets)


def _without_marks(folder: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from cherry_megatron.data.dataset import MarkedDataset

    text = Text(folder / "text", [7, 30, 2, 14, 5], 1, ("picked",))
    cache = folder / "cache"
    options = {"path_to_cache": str(cache), "eod_mask_loss": True}
    theirs = build(GPTDataset, text.prefix, 8, 20, **options)
    made = sorted(cache.iterdir())
    assert made
    plain = build(MarkedDataset, text.prefix, 8, 20, **options)
    picked = build(MarkedDataset, text.prefix, 8, 20, selection="picked", **options)
    assert sorted(cache.iterdir()) == made, "other names would be another order for who has their cache"
    for number in range(20):
        found = {key: value.numpy().tobytes() for key, value in theirs[number].items()}
        assert {key: value.numpy().tobytes() for key, value in plain[number].items()} == found
        sample = picked[number]
        sample.pop("selected")
        assert {key: value.numpy().tobytes() for key, value in sample.items()} == found
    again = pickle.loads(pickle.dumps(picked))  # for the loader's processes
    assert again[3]["selected"].tolist() == picked[3]["selected"].tolist()


def test_without_marks_it_is_megatrons_data_set_with_the_same_cache(tmp_path):
    run_ranks(tmp_path, 1, _without_marks, tmp_path)


# The control


def _pieces(tokens: list[int], starts: np.ndarray) -> list[tuple[int, ...]]:
    """The words of a document, its end left out."""
    words: list[list[int]] = []
    for token in tokens[:-1]:
        if starts[token] or not words:
            words.append([])
        words[-1].append(token)
    return [tuple(word) for word in words]


class Documents(list):
    """What is read of an IndexedDataset."""

    sequence_lengths = None
    get = list.__getitem__


@some
@given(st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=4), st.integers(0, 99))
def test_words_stay_whole_and_tokens_stay_in_their_document(drawn, seed):
    starts = np.arange(10) % 3 == 1
    documents = Documents([np.array([*tokens, END]) for tokens in drawn])
    by_token = ShuffledDocuments(documents, DocumentOrder(documents, seed, END))
    order = DocumentOrder(documents, seed, END, starts)
    by_word = ShuffledDocuments(documents, order)
    places = ShuffledDocuments(Documents([np.arange(len(tokens)) for tokens in documents]), order)
    for number, tokens in enumerate(documents):
        assert sorted(by_token.get(number)) == sorted(tokens) and by_token.get(number)[-1] == END
        read = by_word.get(number)
        assert read.tolist() == tokens[places.get(number)].tolist(), "marks move with their tokens"
        assert read[-1] == END
        at = {place: word for word, place in enumerate(places.get(number).tolist())}
        left, words = 0, _pieces(tokens.tolist(), starts)
        for word in words:
            assert tuple(read[at[left] : at[left] + len(word)]) == word
            left += len(word)
        again = ShuffledDocuments(documents, DocumentOrder(documents, seed, END, starts))
        assert again.get(number, 2, 3).tolist() == read[2:5].tolist()


def test_order_follows_from_seed_and_document():
    documents = Documents([np.arange(1, 40)] * 2)
    orders = [
        DocumentOrder(documents, seed, END)(number).tolist() for seed, number in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert orders[0] == orders[1] and orders[0] != orders[2] != orders[3] != orders[0]


def test_only_the_documents_read_last_are_held(monkeypatch):
    monkeypatch.setattr("cherry_megatron.data.shuffle.CACHED_TOKENS", 100)
    documents = Documents([np.arange(1, 40)] * 9)
    order = DocumentOrder(documents, 0, END)
    first = order(0).tolist()
    for number in range(9):
        order(number)
        assert sum(map(len, order._cache.values())) == order._cached <= 100
    assert order(0).tolist() == first


def test_word_starts_are_the_tokens_that_decode_to_white_space_first(data):
    tokenizer = tokenizers.load(data / "tokenizer")
    starts = tokenizers.word_starts(tokenizer)
    for token in range(2, tokenizer.get_vocab_size()):
        assert starts[token] == (tokenizer.decode([token])[0] in " \t\n\v\f\r"), tokenizer.id_to_token(token)
    assert 0 < starts.sum() < len(starts) and not starts[:2].any()


# The selected share


def _rho_is_what_an_epoch_holds() -> None:
    from cherry_megatron.data import dataset as module

    module.COUNTED_TOKENS = 9

    @some
    @given(texts, st.booleans(), st.booleans(), st.booleans())
    def check(described, shuffle, answers, mask_ends):
        with tempfile.TemporaryDirectory() as scratch:
            names = ("picked", marked.ANSWERS) if answers else ("picked",)
            text = Text(Path(scratch) / "text", *described, names)
            dataset = build(
                module.MarkedDataset, text.prefix, 1, None, selection="picked",
                shuffle="tokens" if shuffle else "none", eod_mask_loss=mask_ends,
            )  # fmt: skip
            samples = [dataset[number] for number in range(len(dataset))]
            eligible = sum(sample["loss_mask"].item() for sample in samples)
            selected = sum((sample["loss_mask"] * sample["selected"]).item() for sample in samples)
            # The first token of the epoch is the only one that is nobody's target.
            place = dataset.dataset.get(dataset.document_index[0], 0, 1).item() - FIRST
            if not mask_ends and (not answers or text.marks[marked.ANSWERS][place]):
                eligible, selected = eligible + 1, selected + int(text.marks["picked"][place])
            assert dataset.rho_counts() == (selected, eligible)
            if selected:
                assert module.rho_of(dataset) == pytest.approx(selected / eligible, rel=1e-12)

    check()


def test_rho_is_what_an_epoch_holds(tmp_path):
    run_ranks(tmp_path, 1, _rho_is_what_an_epoch_holds)


def _blend(folder: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from cherry_megatron.data.dataset import MarkedDataset, rho_of

    short = Text(folder / "short", [9, 4, 11] * 8, 1, ("picked",))
    long = Text(folder / "long", [20, 31] * 20, 2, ("picked", marked.ANSWERS))
    chats = {"blend": ([str(short.prefix), str(long.prefix)], [0.7, 0.3]), "split": "80,20,0"}
    apart = {"blend": None, "split": None, "blend_per_split": [chats["blend"], ([str(long.prefix)], None), None]}
    for given_blend in (chats, apart):
        config = _config(MarkedDataset, 6, path_to_cache=str(folder / "cache"), selection="picked", **given_blend)
        train, valid, _ = BlendedMegatronDatasetBuilder(MarkedDataset, [120, 10, 0], lambda: True, config).build()
        samples = Counter()
        for number in range(120):
            sample = train[number]
            samples[int(sample["dataset_id"])] += 1
            text = (short, long)[sample["dataset_id"]]
            places = [
                text.place(*pair) for pair in zip(sample["labels"].tolist(), sample["tokens"].tolist(), strict=True)
            ]
            assert sample["selected"].tolist() == text.marks["picked"][places].tolist()
            if text is long:
                assert sample["loss_mask"].tolist() == text.marks[marked.ANSWERS][places].tolist()
        assert samples[0] > samples[1] > 0
        share = 0.8 if given_blend is chats else 1
        selected = eligible = 0.0
        for number, text in enumerate((short, long)):
            tokens = text.ends[round(share * len(text.lengths)) - 1]
            answers = text.marks.get(marked.ANSWERS, np.ones(len(text.tokens)))[:tokens]
            eligible += samples[number] * answers.mean()
            selected += samples[number] * (answers * text.marks["picked"][:tokens]).mean()
        assert rho_of(train) == pytest.approx(selected / eligible, rel=1e-12)
        assert 0 < rho_of(valid) < 1


def test_a_blend_has_the_marks_and_the_share_of_each_part(tmp_path):
    run_ranks(tmp_path, 1, _blend, tmp_path)


# As training builds it


def _as_in_training(path: Path, selection: str | None, shuffle: str) -> list[dict[str, list]]:
    from megatron.training.initialize import initialize_megatron

    from cherry_megatron.config import load
    from cherry_megatron.data.batches import build_datasets, build_held_out
    from cherry_megatron.platform.machine import prepare
    from cherry_megatron.pretrain import initialize

    machine = prepare()
    initialize(load(path, (), []), machine, {})
    initialize_megatron(allow_no_cuda=True)
    train, _, _ = build_datasets((40, 8, 0), selection, shuffle)
    rows = [train[number] for number in range(40)] + [build_held_out(8, selection, shuffle)[5]]
    return [{key: row[key].tolist() for key in row} for row in rows]


def test_training_gets_marks_and_the_same_samples(tmp_path, data, write_config):
    ids = np.fromfile(data / "text.bin", np.uint16)
    spaced = tokenizers.word_starts(tokenizers.load(data / "tokenizer"))[ids]
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"text{suffix}").write_bytes((data / f"text{suffix}").read_bytes())
    lengths = np.frombuffer((data / "text.idx").read_bytes(), np.int32, 300, 34)
    run_ranks(tmp_path / "write", 1, write, tmp_path / "text", "spaced", spaced.astype(np.uint8), lengths)
    flags = {"data-path": [str(tmp_path / "text")], "data-cache-path": str(tmp_path / "cache")}
    path = write_config(tmp_path, megatron=flags)
    plain, picked, words = (
        run_ranks(tmp_path / name, 1, _as_in_training, path, selection, shuffle)[0]
        for name, selection, shuffle in (("a", None, "none"), ("b", "spaced", "none"), ("c", "spaced", "words"))
    )
    by_token = tokenizers.word_starts(tokenizers.load(data / "tokenizer"))
    for ours, theirs in zip(picked, plain, strict=True):
        assert ours.pop("selected") == by_token[ours["labels"]].astype(float).tolist()
        assert ours == theirs
    for ours, theirs in zip(words, plain, strict=True):
        assert ours["selected"] == by_token[ours["labels"]].astype(float).tolist()
        assert ours["labels"] != theirs["labels"]


# Errors


def _refusals(folder: Path) -> list[str]:
    from cherry_megatron.data.dataset import MarkedDataset, rho_of

    found = []

    def refused(text: Text, **options: Any) -> None:
        with pytest.raises(CherryError) as caught:
            rho_of(build(MarkedDataset, text.prefix, 4, None, **{"selection": "picked", **options}))
        found.append(str(caught.value).replace(f"{folder}/", ""))

    text = Text(folder / "text", [5, 9, 6], 1, ("picked",))
    refused(text, selection="other")
    bare = Text(folder / "bare", [5, 9, 6], 1, ())
    write(bare.prefix, "picked", np.zeros(20, np.uint8), bare.lengths)
    refused(bare)
    with (folder / "text.picked.bin").open("ab") as file:
        file.write(b"\0")
    refused(text)
    cut = Text(folder / "cut", [5, 9, 6], 1, ("picked", marked.ANSWERS))
    (folder / "cut.answers.idx").unlink()
    refused(cut)
    Text(folder / "text", [5, 8, 7], 1, ())
    (folder / "text.picked.bin").write_bytes(bytes(20))
    refused(text)
    (folder / "text.picked.json").write_text(json.dumps({"name": "picked"}))
    refused(text)
    return found


def test_marks_that_cannot_be_used(tmp_path):
    missing, empty, size, answers, other, unreadable = run_ranks(tmp_path, 1, _refusals, tmp_path)[0]
    assert missing == "there are no marks text.other.bin, .idx and .json; make them with cherry select"
    assert empty.startswith("the marks bare.picked select no target of the train split; ")
    assert size == "text.picked.bin has 21 bytes, not 20: copy it again or make the marks again"
    assert answers == "there are no marks cut.answers.bin, .idx and .json; make them with cherry data --sft"
    assert other == "text.picked.json belongs to other tokens than text.bin; make the marks again"
    assert unreadable == "text.picked.json does not describe marks; make them again with cherry select"
