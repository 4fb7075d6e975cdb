"""Reading: every byte of every kind of file arrives once, and nothing malformed passes or crashes."""

import gzip
import json
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.data import text
from cherry_megatron.data.text import Chunk, documents, find_files, other_files, read_chunks
from cherry_megatron.errors import CherryError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def values(path: Path, key: str = "text") -> list[str | ValueError]:
    return [found for chunk in read_chunks(path) for _, found in documents(chunk, key)]


def parse(raw: bytes, name: str = "a.jsonl") -> list[str | ValueError]:
    return [found for _, found in documents(Chunk(Path(name), 1, raw, 0))]


def test_files_are_found_in_a_stable_order(tmp_path):
    names = ["b.txt", "a.jsonl.zst", "sub/c.MD", "sub/d.v1.txt.gz"]
    for name in [*names, "no.json", "no.gz", "e.parquet", "txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ["a.jsonl.zst", "b.txt", "sub/c.MD", "sub/d.v1.txt.gz"]]
    assert find_files([tmp_path]) == expected
    assert find_files(iter([tmp_path / "b.txt", tmp_path / "sub"])) == [expected[1], *expected[2:]]
    left_out = [tmp_path / name for name in ["e.parquet", "no.gz", "no.json", "txt"]]
    assert other_files([tmp_path, tmp_path / "b.txt"]) == left_out


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["absent.txt"], "absent.txt does not exist"), (["x.json"], "x.json: unknown kind"), (["empty"], "empty")],
)
def test_unusable_inputs_are_named(tmp_path, names, expected):
    (tmp_path / "x.json").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CherryError, match=expected):
        find_files([tmp_path / name for name in names])


@pytest.mark.parametrize("suffix", COMPRESS)
@given(content=st.binary(max_size=400), size=st.integers(1, 60), block=st.integers(1, 40), cut=st.integers(0, 400))
def test_chunks_hold_every_byte_and_end_at_line_ends(suffix, content, size, block, cut):
    content = content.replace(b"\xef\xbb\xbf", b"\n")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK_BYTES", "ZSTD_BLOCK_BYTES"):
            patch.setattr(text, name, block)
        patch.setattr(text, "CHUNK_BYTES", size)
        path = Path(folder) / f"a.txt{suffix}"
        # Two compressed streams in one file are one text.
        path.write_bytes(COMPRESS[suffix](content[:cut]) + COMPRESS[suffix](content[cut:]))
        chunks = list(read_chunks(path))
        assert b"".join(chunk.raw for chunk in chunks) == content
        assert all(chunk.raw.endswith(b"\n") for chunk in chunks[:-1])
        assert all(chunk.raw for chunk in chunks)
        before = 0
        for chunk in chunks:
            assert chunk.line == content[:before].count(b"\n") + 1
            before += len(chunk.raw)
            # Not longer than asked for, but where a line, or a block that was read at once, is.
            longest_line = max(map(len, content.split(b"\n"))) + 1
            assert suffix or len(chunk.raw) <= size + block + longest_line
        read = sum(chunk.disk for chunk in chunks)
        assert read == len(content) if not suffix else 0 <= read <= path.stat().st_size


def test_a_chunk_is_cut_where_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)
    path = tmp_path / "long.md"
    path.write_bytes(b"0123456789abcde\n" * 1000)
    sizes = [len(found) for found in values(path)]
    assert sum(sizes) == 16000 and all(800 < size <= 1100 for size in sizes[:-1])


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    ascii_only=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n"]),
    last_line_end=st.booleans(),
)
def test_jsonl_gives_back_every_text(texts, ascii_only, line_end, last_line_end):
    lines = [json.dumps({"id": 1, "text": t, "z": [t]}, ensure_ascii=ascii_only) for t in texts]
    raw = line_end.join(lines) + (line_end if last_line_end else "")
    assert parse(raw.encode()) == (texts or [""])


@given(st.binary() | st.text().map(str.encode) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "x"]), inner),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_line_is_a_text_or_malformed(raw):
    for name in ("a.jsonl", "a.txt"):
        for found in parse(raw, name):
            assert isinstance(found, ValueError) or found.encode().decode() == found
    assert len(parse(raw)) == raw.removesuffix(b"\n").count(b"\n") + 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xb0\xa1"}', r"not UTF-8 \(byte 10 is 0xb0\)"),
        (b'{"body": "a"}', "no text under the key 'text'"),
        (b'{"text": null}', "no text under the key 'text'"),
        (b'["text"]', "no JSON object"),
        (b'{"text": "\\ud83d"}', "unpaired surrogate"),
        (b'{"text": ' + b"[" * 100_000, "not usable JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not usable JSON"),
    ],
)
def test_a_malformed_line_says_why_and_the_next_is_read(raw, reason):
    found = list(documents(Chunk(Path("a.jsonl"), 7, raw + b'\n{"text": "next"}\n', 0)))
    assert [number for number, _ in found] == [7, 8]
    with pytest.raises(ValueError, match=reason):
        raise found[0][1]
    assert found[1][1] == "next"


def test_the_last_suffix_decides_and_blank_lines_are_empty():
    assert parse(b'{"text": "a"}', "a.jsonl.txt") == ['{"text": "a"}']
    assert parse(b'{"text": "a"}', "a.txt.jsonl.GZ") == ["a"]
    assert parse(b'\n \r\n{"text": "\\ud83d\\ude00"}') == ["", "", "😀"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert values(tmp_path / "a.txt") == ["a\ufeff"]
    assert values(tmp_path / "a.jsonl") == ["a"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-5], lambda raw: b"garbage" + raw[7:], lambda raw: raw[:40] * 9]
)
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](bytes(i * i % 251 for i in range(5000)))
    path.write_bytes(damage(whole))
    with pytest.raises(CherryError, match=f"cannot read {path}: "):
        list(read_chunks(path))


def test_a_file_compressed_with_a_long_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compressor.compress(b"a long way back\n") + compressor.flush())
    assert values(path) == ["a long way back\n"]
