"""Lineage: the chain from a compressed checkpoint back, and whether it still holds."""

import json
import shutil
from pathlib import Path

import pytest

from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.surgery import compress
from tests.surgery.conftest import model_tensors, save


@pytest.fixture
def family(tmp_path, config) -> Path:
    """deep -> small -> smaller."""
    save(tmp_path / "deep", model_tensors(8))
    path = config()
    compress.plan_compression(tmp_path / "deep", path, (), compress.Options()).run(tmp_path / "small", 2)
    path = config(recurrence={"pattern": "*-[*-]x2"})
    compress.plan_compression(tmp_path / "small", path, (), compress.Options()).run(tmp_path / "smaller", 2)
    return tmp_path


def test_the_chain_is_told_newest_first(family, capsys):
    assert main(["lineage", str(family / "smaller")]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert "compress-depth" in first and first.endswith("(verified)")
    assert second.startswith("  ") and "small/iter_0000000" in second and "there, same manifest" in second
    assert third.startswith("    ") and "unknown" in third and "had no manifest" in third


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
