"""Safetensors files are what the format's own library writes and reads, and damaged ones are told."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.weights import Weights, index_of, shards
from cherry_megatron.surgery.writing import Spec

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "c": torch.tensor(7.0, dtype=torch.float64),
    "d": torch.zeros(0, 4, dtype=torch.float16),
}  # fmt: skip


def write(folder, tensors=TENSORS):
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_every_type_and_shape_is_read(tmp_path):
    found = Weights(write(tmp_path))
    found.check(list(found.tensors))
    for name, tensor in TENSORS.items():
        described = found.tensors[name]
        assert (described.dtype, described.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        assert np.array_equal(found.read(name), bits.numpy())
    assert pickle.loads(pickle.dumps(found)).tensors == found.tensors  # as worker processes get it


@pytest.mark.parametrize(("most", "files"), [(10**9, 1), (100, 2), (60, 2), (59, 3), (1, 3)])
def test_what_is_laid_out_is_read_by_the_library(most, files, tmp_path):
    specs = [[Spec("x", "float32", (3, 5)), Spec("y", "bfloat16", (2,))], [Spec("z", "float32", (7,))]]
    specs += [[Spec("w", "int64", (2, 2))]]
    laid = shards(specs, most)
    assert len(laid) == files
    values = {}
    for shard in laid:
        with (tmp_path / shard.file).open("xb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    for group in specs:
        for spec in group:
            values[spec.name] = torch.full(spec.shape, len(values) + 1.5).to(getattr(torch, spec.dtype))
            shard = next(shard for shard in laid if spec.name in shard.places)
            with (tmp_path / shard.file).open("r+b") as file:
                file.seek(shard.places[spec.name])
                file.write(values[spec.name].view(torch.uint8).numpy().tobytes())
    if files > 1:
        (tmp_path / "model.safetensors.index.json").write_text(index_of(laid))
    read = {name: t for shard in laid for name, t in load_file(tmp_path / shard.file).items()}
    assert read.keys() == values.keys() == Weights(tmp_path).tensors.keys()
    assert all(torch.equal(read[name], value) for name, value in values.items())
    assert all(len(shard.header) % 8 == 0 for shard in laid)


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    Weights(folder).check(list(TENSORS))


def _header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def _long(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def _none(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(names):
    def write_index(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return write_index


def _other_type(folder):
    save_file({"q": torch.zeros(4).to(torch.float8_e4m3fn)}, folder / "model.safetensors")


def _other_values(folder):
    (folder / "manifest.json").write_text(json.dumps({"tensors": {name: {"0": "00"} for name in TENSORS}}))
    Weights(folder).read("b")


def _other_names(folder):
    (folder / "manifest.json").write_text(json.dumps({"tensors": {"a": {}, "z": {}}}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, r"model.safetensors is truncated: it has \d+ bytes, and at least \d+ by its header; restore"),
        (_header, r"model.safetensors is no safetensors file"),
        (_long, "its header would have"),
        (_none, "pytorch_model.bin, which is a pickle"),
        (_index({"a": "../x.safetensors"}), "index.json is damaged .*is not beside it"),
        (_index({"a": "other.safetensors"}), "cannot read .*other.safetensors: No such file"),
        (_index({"a": "model.safetensors", "q": "model.safetensors"}), "lacks the tensor q"),
        (_index([]), "index.json is damaged"),
        (_other_type, "the tensor q is of the type F8_E4M3"),
        (_other_values, r"the tensor b is not what was saved \(SHA-256\)"),
        (_other_names, "the tensor b is not both in manifest.json and in the weights"),
    ],
)
def test_damage_is_told(damage, says, tmp_path):
    with pytest.raises(CherryError, match=says):
        damage(write(tmp_path))
        Weights(tmp_path)
