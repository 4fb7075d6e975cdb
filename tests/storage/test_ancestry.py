"""Lineage: the chain from a compressed checkpoint back, and whether it still holds."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from cherry_megatron.storage.ancestry import _at, _code, describe, how
from cherry_megatron.storage.lineage import ancestors, chain, read_lineage
from cherry_megatron.surgery import compress
from tests.surgery.conftest import model_tensors, save


@pytest.fixture
def family(tmp_path, config) -> Path:
    """deep -> small -> smaller."""
    save(tmp_path / "deep", model_tensors(8))
    path = config(recurrence={"pattern": "(*-)x4"})
    compress.plan_compression(tmp_path / "deep", path, (), compress.Options()).run(tmp_path / "small", 2)
    path = config(recurrence={"pattern": "*-[*-]x2"})
    compress.plan_compression(tmp_path / "small", path, (), compress.Options()).run(tmp_path / "smaller", 2)
    return tmp_path


def test_the_chain_is_told_newest_first(family, capsys):
    assert main(["lineage", str(family / "smaller")]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert "compress-depth" in first and first.endswith("iter_0000000  average, groups adjacent  (verified)")
    assert second.startswith("  ") and "small/iter_0000000" in second and "there, same manifest" in second
    assert third.startswith("    ") and "unknown" in third and "had no manifest" in third


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({}, ""),
        ({"options": {"method": "select", "groups": "0-3,4-7", "align": "none"}}, "select, groups 0-3,4-7  "),
        (
            {"options": {"method": "average", "groups": "slots", "align": "weights"}},
            "average, groups slots, align weights  ",
        ),
        (
            {"config": {"changed": ["recurrence.order", "megatron.rotary-base"]}},
            "changed recurrence.order megatron.rotary-base  ",
        ),
        # A compression has the weights as they were trained.
        ({"options": {}, "config": "a.yaml", "settings": {"changed": ["recurrence.order"]}}, ""),
    ],
)
def test_how_is_told_compactly(entry, says):
    assert how(entry) == says


def test_the_chain_outlives_the_ancestors(family):
    shutil.rmtree(family / "deep")
    shutil.rmtree(family / "small")
    _, second, third = describe(family / "smaller", verify=True)
    assert second.endswith("(no longer there)") and third.endswith("(no longer there)")


def test_an_ancestor_that_changed_is_noticed(family):
    manifest = family / "small/iter_0000000/manifest.json"
    manifest.write_text(manifest.read_text().replace('"0,0": "', '"0,0": "0', 1))
    with pytest.raises(CherryError, match="is no longer the checkpoint"):
        describe(family / "smaller", verify=True)


def test_every_flipped_byte_of_a_tensor_is_noticed(family):
    folder = family / "smaller/iter_0000000"
    for path in sorted(folder.glob("__[0-9]*.distcp")):
        data = bytearray(path.read_bytes())
        place = data.index(b"data/0") + 40  # within the values
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(CherryError, match=r"is not what was saved \(SHA-256\)"):
            describe(family / "smaller", verify=True)
        data[place] ^= 1
        path.write_bytes(data)
    assert describe(family / "smaller", verify=True)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {"flipped": _flip, "overwritten": lambda path: path.write_text("{}"), "gone": Path.unlink}


def test_damage_to_what_is_no_tensor_is_noticed(family, config, capsys):
    """By a compression too, as far as it reads it."""
    more = ["--save", family / "new", "--config", config(recurrence={"pattern": "*-[*-]x2"})]
    for file in (".metadata", "metadata.json", "integrity.json", "__objects.distcp"):
        path = family / "small/iter_0000000" / file
        content = path.read_bytes()
        for kind, damage in DAMAGES.items():
            damage(path)
            verbs = [["lineage", family / "small"], ["compress-depth", "--load", family / "small", *more]]
            for verb in verbs[: 2 if file in (".metadata", "metadata.json") else 1]:
                assert main([*map(str, verb)]) == 2, (file, kind)
                said = capsys.readouterr().err
                assert file in said and said.endswith("; restore the checkpoint\n") and said.count("\n") == 1, said
            path.write_bytes(content)
    assert main(["lineage", str(family / "small")]) == 0 and not (family / "new").exists()


def test_hashes_that_are_none_are_refused(family):
    path = family / "small/iter_0000000/integrity.json"
    for content in ("7", "[]", '{"files": {}}', "[" * 100_000, "\0", '{"algorithm": "md5", "files": {}}'):
        path.write_text(content)
        with pytest.raises(CherryError, match=re.escape(f"{path} is damaged; restore the checkpoint")):
            describe(family / "small", verify=True)


@pytest.mark.parametrize("name", ["common.pt", "__99_0.distcp"])
def test_what_megatron_would_read_beside_what_was_saved_is_named(name, family):
    foreign = family / "small/iter_0000000" / name
    foreign.write_bytes(b"")
    with pytest.raises(CherryError, match=re.escape(f"{foreign} is none of the files that integrity.json names")):
        describe(family / "small", verify=True)


def test_compressing_a_damaged_source_is_refused(family, config):
    path = max((family / "small/iter_0000000").glob("__[0-9]*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[data.index(b"data/0") + 40] ^= 1  # within the values
    path.write_bytes(data)
    surgery = compress.plan_compression(
        family / "small", config(recurrence={"pattern": "*-[*-]x2"}), (), compress.Options()
    )
    with pytest.raises(CherryError, match="is not what was saved"):
        surgery.run(family / "new", 2)
    assert not (family / "new").exists() and not list(family.glob(".new*"))


def test_identity_is_the_content(family, config):
    path = config(recurrence={"pattern": "*-[*-]x2"})
    compress.plan_compression(family / "small", path, (), compress.Options()).run(family / "again", 1)
    ours, theirs = (
        json.loads((family / name / "iter_0000000/lineage.json").read_text()) for name in ("again", "smaller")
    )
    assert ours["identity"] == theirs["identity"] and ours["parents"] == theirs["parents"]


@pytest.mark.parametrize(
    ("file", "says"),
    [("lineage.json", "has no lineage.json"), ("manifest.json", "manifest.json is missing")],
)
def test_a_record_that_is_gone_is_said(family, file, says):
    (family / "smaller/iter_0000000" / file).unlink()
    with pytest.raises(CherryError, match=says):
        describe(family / "smaller", verify=True)


def test_a_manifest_of_another_checkpoint_is_noticed(family):
    shutil.copy(family / "small/iter_0000000/manifest.json", family / "smaller/iter_0000000/manifest.json")
    with pytest.raises(CherryError, match="lacks the tensor"):
        describe(family / "smaller", verify=True)


def test_a_manifest_that_is_not_the_records_is_noticed(family):
    path = family / "smaller/iter_0000000/manifest.json"
    content = json.loads(path.read_text())
    name = next(iter(content["tensors"]))
    content["tensors"][name] = dict.fromkeys(content["tensors"][name], "0" * 64)
    path.write_text(json.dumps(content))
    with pytest.raises(CherryError, match="do not belong together"):
        describe(family / "smaller", verify=True)


@pytest.fixture
def alone(tmp_path) -> Path:
    """A checkpoint of 4 layers without parents."""
    return save(tmp_path / "deep", model_tensors(4))


ONE = {"operation": "pretrain", "identity": "0" * 64, "path": "/none", "parents": []}
WRONG = {
    "list": ([ONE], 'the whole is [{"operation": "pretrain", '),
    "number": (7, "the whole is 7, not a record"),
    "no-parents": ({**ONE, "parents": None}, "parents is null, not a list"),
    "parents-by-name": ({**ONE, "parents": {"a": 1}}, 'parents is {"a": 1}, not a list'),
    "texts-as-parents": ({**ONE, "parents": ["a"]}, 'parents[0] is "a", not a record'),
    "no-operation": ({"identity": "0", "parents": []}, "operation is null, not a text"),
    "no-identity": ({"operation": "pretrain", "parents": []}, "identity is null, not a text"),
    "identity": ({**ONE, "identity": 12}, "identity is 12, not a text"),
    "parent-without-path": ({**ONE, "parents": [{**ONE, "path": None}]}, "parents[0].path is null, not a text"),
    "grandparent": (
        {**ONE, "parents": [ONE, {**ONE, "parents": [{**ONE, "identity": []}]}]},
        "parents[1].parents[0].identity is [], not a text",
    ),
    "role": ({**ONE, "parents": [{**ONE, "role": 1}]}, "parents[0].role is 1, not a text"),
    "code": ({**ONE, "git": "main"}, 'git is "main", not keys and values'),
    "walk": ({**ONE, "recurrence": "*-"}, 'recurrence is "*-", not keys and values'),
    "walk-of-a-training": ({**ONE, "config": {"recurrence": []}}, "config.recurrence is [], not keys and values"),
    "options": ({**ONE, "options": []}, "options is [], not keys and values"),
    "no-expert": ({**ONE, "operation": "extract-expert"}, "expert is null, not a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_record_that_is_none_is_refused_before_any_work(name, alone, config, capsys):
    content, says = WRONG[name]
    path = alone / "iter_0000007/lineage.json"
    path.write_text(json.dumps(content))
    more = ["--save", alone.parent / "new", "--config", config(recurrence={"pattern": "*-[*-]x2"})]
    for verb in (["lineage", alone], ["compress-depth", "--load", alone, *more]):
        assert main([*map(str, verb)]) == 2
        said = capsys.readouterr()
        assert f"{path} is damaged ({says}" in said.err and said.err.count("\n") == 1 and not said.out, said
    assert not (alone.parent / "new").exists()


@pytest.mark.parametrize("text", ["", '{"operation":', "[" * 100_000, "\0"])
def test_a_record_that_is_no_json_is_refused(text, alone, capsys):
    path = alone / "iter_0000007/lineage.json"
    path.write_text(text)
    assert main(["lineage", str(alone)]) == 2
    said = capsys.readouterr().err
    assert f"{path} is damaged (" in said and said.count("\n") == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "a", "*-", "teacher"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ONE, "git", "config"]), inner),
    max_leaves=8,
)


@settings(max_examples=60)
@given(
    st.sampled_from(
        [*ONE, "git", "config", "role", "expert", "recurrence", "time", "iteration", "options", "settings"]
    ),
    JSON,
    st.booleans(),
)
def test_whatever_a_record_holds_it_is_told_or_refused(key, value, of_parent):
    """Everything that is read of a record that was not refused is of the type that its readers take."""
    changed = {**ONE, key: value}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lineage.json").write_text(
            json.dumps({**ONE, "parents": [changed]} if of_parent else changed)
        )
        try:
            found = read_lineage(Path(folder))
        except CherryError:
            return
    told = [entry for _, entry in chain(found)]
    assert told == ([found, changed] if of_parent else [found])
    for entry in told:
        texts = [
            entry["operation"],
            entry["identity"],
            entry.get("role", ""),
            _code(entry),
            _at(entry),
            how(entry),
        ]
        assert all(isinstance(text, str) for text in texts)
        assert _at(entry) == (f" step {entry['iteration']}" if "iteration" in entry else "")
    taught = of_parent and changed.get("role") == "teacher"
    assert list(ancestors(found)) == (told[:1] if taught else told)


@pytest.mark.parametrize(("key", "value"), [("pattern", 5), ("order", "backwards"), ("loops", "many")])
def test_a_record_of_no_walk_is_one_sentence(key, value, alone, config, capsys):
    path = alone / "iter_0000007/lineage.json"
    path.write_text(json.dumps({**ONE, "recurrence": {"pattern": "*-[*-*-]x4*-", key: value}}))
    arguments = ["--load", alone, "--save", alone.parent / "new", "--config", config()]
    assert main([*map(str, ["compress-depth", "--expand", *arguments])]) == 2
    said = capsys.readouterr().err
    assert f"{path}: recurrence.{key} " in said and said.count("\n") == 1
