"""Drafts change no token, and some are taken."""

from pathlib import Path

import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.inference.draft import Drafting, drafting
from cherry_megatron.inference.generate import _grow
from cherry_megatron.inference.rows import Row
from tests.conftest import run_ranks
from tests.inference.test_generate import continued, with_model

NEW = 24


def with_drafts(_, count, model):
    """Texts of so many prompts without drafts and with several kinds, with the share of drafts that was taken."""
    import random

    draw = random.Random(4)
    prompts = [[draw.randrange(300, 500) for _ in range(draw.randint(1, 20))] for _ in range(count)]
    given = {"tokens": NEW}
    plain = continued(model, prompts, 0.0, **given)
    # A frequent token ends texts, so that rows leave the batch one after the other.
    end = plain.texts[0][NEW // 2]
    found = []
    for temperature, options in ((0.0, {}), (1.0, {"top_k": 50, "top_p": 0.9})):
        expected = continued(model, prompts, temperature, end=end, **given, **options)
        assert (expected.drafted, expected.accepted) == (0, 0)
        for draft in (Drafting(1, 1), Drafting(1, 4), Drafting(2, 3)):
            drafted = continued(model, prompts, temperature, end=end, drafting=draft, **given, **options)
            found.append((drafted.texts == expected.texts, drafted.accepted / drafted.drafted))
    return found, len({len(text) for text in expected.texts})


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.full)])
def test_texts_are_those_without_drafts(count, speaking: Path, tmp_path: Path):
    ((found, lengths),) = run_ranks(tmp_path, 1, with_model, speaking, "", with_drafts, count)
    assert lengths > 2
    for same, share in found:
        assert same
        assert 0.02 < share < 0.98, "drafts that are all wrong, or all right, are no test"


def all_taken(_, model):
    """Drafts with all loops are always right, and each saves a pass."""
    calls = []
    drafted = continued(model, [[5, 6], [7]], drafting=Drafting(3, 2), heard=lambda row: calls.append(row.number))
    return drafted.texts == continued(model, [[5, 6], [7]]).texts, drafted.accepted, drafted.drafted, calls


def test_right_drafts_save_passes(speaking: Path, tmp_path: Path):
    (found,) = run_ranks(tmp_path, 1, with_model, speaking, "", all_taken)
    assert found == (True, 8, 8, [0, 1] * 2)  # 2 texts of 6 tokens: twice 2 drafted and 1 more


class Counting:
    """A model whose texts count up, and drafts of three tokens that are always right."""

    def draft(self, rows, most):
        return [[row.tokens[-1] + 1 + ahead for ahead in range(min(3, most))] for row in rows]

    def keep(self, rows):
        pass

    def logits_after(self, texts, count):
        return None

    def after(self, logits, count, rows, texts):
        return [[token + 1 for token in text[-count:]] for text in texts]


def test_counts_drafts_that_could_become_text():
    counting = Counting()
    rows = [Row(0, [7], 5, end=-1), Row(1, [3], 2, end=-1)]
    counts = _grow(rows, counting, counting, counting, lambda _: None)
    assert [row.new for row in rows] == [[8, 9, 10, 11, 12], [4, 5]]
    assert counts == (5, 5)  # three of the first text; of the second two, though three were drafted


def test_asked_for():
    assert drafting(None, False, None) is None
    for loops, ahead, tokens, depths, most in (
        (2, False, None, 0, 2),
        (2, False, 7, 0, 7),
        (2, False, None, 3, 2),
        (None, True, None, 3, 3),
        (None, True, 7, 3, 7),
    ):
        found = drafting(loops, ahead, tokens)
        found.check(3, depths)
        assert (found.loops, found.most(depths)) == (loops, most)
    for loops, tokens, of, depths, says in (
        (3, 1, 3, 0, "--draft-loops 3 must be from 1 to 2"),
        (0, 1, 3, 0, "--draft-loops 0 must be from 1 to 2"),
        (1, 0, 3, 0, "--draft-tokens 0 must be at least 1"),
        (1, 1, 1, 0, "a model of one loop has none to leave out"),
        (None, 1, 3, 0, "--draft-mtp: the model has no multi-token prediction"),
        (None, 0, 1, 1, "--draft-tokens 0 must be at least 1"),
    ):
        with pytest.raises(CherryError, match=says):
            Drafting(loops, tokens).check(of, depths)
    with pytest.raises(CherryError, match="--draft-tokens 3 needs --draft-loops"):
        drafting(None, False, 3)
    with pytest.raises(CherryError, match="--draft-loops 2 and --draft-mtp are two ways to draft"):
        drafting(2, True, None)
