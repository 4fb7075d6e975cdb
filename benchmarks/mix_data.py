"""The text of the depth experiment: documents of several indexed files in one, shuffled, so many tokens of each.

    cherry tokenizer --input ko_docs.jsonl.zst ko_reviews.jsonl.zst en_docs.jsonl.zst --output DIR/tokenizer \
        --vocab-size 16384 --limit-mb 60
    cherry data --input ko_docs.jsonl.zst ko_reviews.jsonl.zst --output DIR/ko --tokenizer DIR/tokenizer
    cherry data --input en_docs.jsonl.zst --output DIR/en --tokenizer DIR/tokenizer
    python benchmarks/mix_data.py --output DIR/text DIR/ko=20000000 DIR/en=30000000
"""

import argparse
import json
import random
from pathlib import Path

from cherry_megatron.platform.machine import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("inputs", nargs="+", metavar="PREFIX=TOKENS")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    prepare()
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefixes = [text.rpartition("=")[0] for text in options.inputs]
    left = [int(text.rpartition("=")[2]) for text in options.inputs]
    sources = [IndexedDataset(prefix) for prefix in prefixes]
    documents = [(k, number) for k, source in enumerate(sources) for number in range(len(source))]
    random.Random(options.seed).shuffle(documents)
    builder = IndexedDatasetBuilder(f"{options.output}.bin", dtype=sources[0].index.dtype)
    tokens, kept = 0, 0
    for k, number in documents:
        if left[k] <= 0:
            continue
        document = torch.from_numpy(sources[k][number].astype("int64"))
        builder.add_item(document)
        builder.end_document()
        left[k] -= len(document)
        tokens, kept = tokens + len(document), kept + 1
    builder.finalize(f"{options.output}.idx")
    made = json.loads(Path(f"{prefixes[0]}.json").read_text())
    report = {key: made[key] for key in ("tokenizer", "vocabulary", "end_of_document")}
    report |= {"documents": kept, "tokens": tokens, "inputs": options.inputs}
    Path(f"{options.output}.json").write_text(json.dumps(report))
    print(f"{options.output}: {tokens:,} tokens")


if __name__ == "__main__":
    main()
