"""Instruction pairs by templates from Korean text, for `cherry data --sft`.

    python benchmarks/make_pairs.py --reviews ko_reviews.jsonl.zst --documents ko_docs.jsonl.zst --output DIR
    cherry data --sft --input DIR/train.jsonl --output DIR/train --tokenizer TOKENIZER

Three kinds: a film review is rated and the rating explained by what the review says; a text is written to its
title; a text is continued. A film or a document is either in train.jsonl or in held_out.jsonl with all its pairs.
The reviews' lines hold `text` (a review a line), `ratings` (1 to 10) and `movie`; the documents' lines `text`.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cherry_megatron.data.text import json_object, lines, read_chunks
from cherry_megatron.files import make_folder, write_atomically

RATE = (
    "다음 영화 리뷰를 읽고 별점(1~10)과 그 이유를 말해 주세요.\n\n{0}",
    "아래 관람평을 쓴 사람은 영화에 몇 점을 주었을까요? 이유도 함께 설명해 주세요.\n\n관람평: {0}",
    "리뷰: {0}\n\n이 리뷰의 평점을 10점 만점으로 매기고 근거를 들어 주세요.",
    "“{0}”\n위 감상이 긍정적인지 부정적인지 판단하고, 예상 별점과 이유를 적어 주세요.",
)
RATED = (
    "별점은 10점 만점에 {rating}점입니다. “{reason}”에서 {mood} 평가임을 알 수 있습니다.",
    "{rating}점으로 보입니다. {mood} 감상이며, “{reason}” 부분이 그 근거입니다.",
    "{mood} 리뷰이며 예상 별점은 {rating}점입니다. 근거는 다음 표현입니다: “{reason}”",
)
MOODS = {True: "긍정적인", False: "부정적인"}
CUES = {
    True: (
        "최고",
        "재밌",
        "재미있",
        "감동",
        "명작",
        "추천",
        "훌륭",
        "완벽",
        "아름다",
        "멋지",
        "멋있",
        "수작",
        "여운",
    ),
    False: (
        "최악",
        "재미없",
        "지루",
        "별로",
        "쓰레기",
        "아깝",
        "아까",
        "실망",
        "유치",
        "노잼",
        "짜증",
        "허접",
        "망작",
    ),
}
TITLE = (
    "다음 제목으로 글을 써 주세요.\n\n제목: {0}",
    "‘{0}’에 대해 설명해 주세요.",
    "설명서에 들어갈 ‘{0}’ 항목의 내용을 작성해 주세요.",
)
CONTINUE = (
    "다음 글을 이어서 써 주세요.\n\n{0}",
    "아래 글의 뒷부분을 완성해 주세요.\n\n{0}",
    "{0}\n\n위 글에 이어질 내용을 써 주세요.",
)
SENTENCE = re.compile(r"(?<=[다요오][.!?])\s+")
LONGEST = 600  # characters of a run of prose
# Format codes of messages, markup, and the captions of figures and tables.
NO_PROSE = re.compile(r"%[\w%(]|\$\{|\{.*\}|<\w|[|`\[\]]|^(그림|표|예제|예) ?[\d.]")

Pair = dict[str, Any]


def review_pairs(film: dict[str, Any], draw: random.Random) -> Iterator[Pair]:
    """One pair of a film at most for each of the two moods."""
    rated = list(zip(film["text"].split("\n"), film["ratings"], strict=True))
    draw.shuffle(rated)
    for is_good in (True, False):
        for review, rating in rated:
            reason = _reason(review, is_good) if _is_clear(rating, is_good) else None
            if reason is not None:
                answer = draw.choice(RATED).format(rating=rating, reason=reason, mood=MOODS[is_good])
                yield _pair("rating", draw.choice(RATE).format(review), answer)
                break


def _is_clear(rating: int, is_good: bool) -> bool:
    return rating >= 9 if is_good else rating <= 3


def _reason(review: str, is_good: bool) -> str | None:
    """The clause that speaks for the rating, if nothing in the review speaks against it."""
    if not 20 <= len(review) <= 200 or any(cue in review for cue in CUES[not is_good]):
        return None
    clauses = [clause.strip(" .,!?~ㅋㅎㅠㅜ^") for clause in re.split(r"[.,!?~\n]+|\.\.+", review)]
    fit = [clause for clause in clauses if 5 <= len(clause) <= 60 and any(cue in clause for cue in CUES[is_good])]
    return fit[0] if fit else None


def document_pairs(document: dict[str, Any], draw: random.Random) -> Iterator[Pair]:
    """Each run of prose once: written to its title if one stands before it, else continued."""
    if document.get("kind", "doc") != "doc":  # messages of a program, one after the other
        return
    found = [line.strip() for line in document["text"].split("\n") if line.strip()]
    place = 0
    while place < len(found):
        title = found[place].strip("#* ")
        has_title = _is_title(title)
        used, text = _prose(found[place + has_title :])
        place += max(1, used + has_title)
        if has_title and len(text) >= 2:
            yield _pair("title", draw.choice(TITLE).format(title), " ".join(text))
        elif len(text) >= 4:
            half = len(text) // 2
            asked = draw.choice(CONTINUE).format(" ".join(text[:half]))
            yield _pair("continuation", asked, " ".join(text[half:]))


def _is_title(line: str) -> bool:
    return (
        4 <= len(line) <= 40
        and line[-1] not in ".?!:;,…"
        and re.search("[가-힣]{2}", line) is not None
        and not NO_PROSE.search(line)
    )


def _prose(found: list[str]) -> tuple[int, list[str]]:
    """How many of the first lines are prose, up to LONGEST characters, and their sentences."""
    sentences: list[str] = []
    for used, line in enumerate(found):
        too_long = sum(map(len, sentences)) + len(line) > LONGEST
        if too_long or not re.search(r"[다요오][.!?]$", line) or NO_PROSE.search(line):
            return used, sentences
        sentences += SENTENCE.split(line)
    return len(found), sentences


def _pair(kind: str, asked: str, answered: str) -> Pair:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"kind": kind, "messages": messages}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for chunk in read_chunks(path):
        for _, found in lines(chunk, json_object):
            if isinstance(found, dict):
                yield found


def make(options: argparse.Namespace) -> dict[str, list[Pair]]:
    """The pairs of both splits; those of a film or a document follow from the seed and itself alone."""
    made: dict[str, list[Pair]] = {"train": [], "held_out": []}
    answers = set()
    sources = ((options.reviews, "movie", review_pairs), (options.documents, "text", document_pairs))
    for path, name, pairs in sources:
        for source in _read(path):
            draw = random.Random(f"{options.seed} {source[name]}")
            split = "held_out" if draw.random() < options.held_out else "train"
            for pair in pairs(source, draw):
                answer = pair["messages"][-1]["content"]
                if answer not in answers:  # manuals repeat themselves, also across the two splits
                    answers.add(answer)
                    made[split].append(pair)
    return {split: _limited(found, options, split == "train") for split, found in made.items()}


def _limited(pairs: list[Pair], options: argparse.Namespace, train: bool) -> list[Pair]:
    """In another order, and at most so many of each kind."""
    random.Random(options.seed).shuffle(pairs)
    most = options.of_each if train else round(options.of_each * options.held_out)
    kept: Counter[str] = Counter()
    found = []
    for pair in pairs:
        if kept[pair["kind"]] < most:
            kept[pair["kind"]] += 1
            found.append(pair)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--of-each", type=int, default=5000, help="pairs of a kind to train on, at most")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the films and documents held out")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    make_folder(options.output)
    for split, pairs in make(options).items():
        path = options.output / f"{split}.jsonl"
        write_atomically(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        kinds = Counter(pair["kind"] for pair in pairs)
        print(f"{path}: {len(pairs):,} pairs; " + ", ".join(f"{kind} {n:,}" for kind, n in sorted(kinds.items())))


if __name__ == "__main__":
    main()
