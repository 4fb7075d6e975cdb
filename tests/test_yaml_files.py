"""What a configuration extends is found, or the file that names it is named."""

import re

import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.yaml_files import read_file


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("[r.yaml]", "`extends` is ['r.yaml']; name one file, as text"),
        ("{r: r.yaml}", "`extends` is {'r': 'r.yaml'}; name one file, as text"),
        ("7", "`extends` is 7; name one file, as text"),
        ("none.yaml", "`extends` names none.yaml, and PATH/none.yaml is not there; correct the name"),
        ("it.yaml", "extends it.yaml, which extends it again"),
    ],
)
def test_a_parent_that_cannot_be_is_said_of_its_file(named, says, tmp_path):
    path = tmp_path / "it.yaml"
    path.write_text(f"extends: {named}\nrun: runs/it\n")
    with pytest.raises(CherryError, match=re.escape(says.replace("PATH", str(tmp_path)))) as found:
        read_file(path)
    assert str(found.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there_is_to_be_named_right(tmp_path):
    with pytest.raises(CherryError, match=r"none\.yaml: No such file or directory; correct the name$"):
        read_file(tmp_path / "none.yaml")


def test_a_file_wins_over_what_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("run: a\nmegatron: {lr: 1, seed: 2}\n")
    (tmp_path / "it.yaml").write_text("extends: base.yaml\nmegatron: {lr: 3}\n")
    assert read_file(tmp_path / "it.yaml") == {"run": "a", "megatron": {"lr": 3, "seed": 2}}
