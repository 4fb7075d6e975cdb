"""The codec against torch itself."""

import contextlib
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.storage import records

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def saved(tensor: torch.Tensor) -> bytes:
    out = io.BytesIO()
    torch.save(tensor, out)
    return out.getvalue()


def bits(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@settings(deadline=None)
@given(st.sampled_from(sorted(records.DTYPES)), SHAPES, st.binary(max_size=9), st.integers(0, 2**31))
def test_a_tensor_is_read_and_written_as_by_torch(name, shape, before, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * 100).to(getattr(torch, name))
    data = saved(tensor)
    dtype, values = records.read_tensor(io.BytesIO(before + data + b"behind"), len(before), len(data))
    assert dtype == name and np.array_equal(values, bits(tensor), equal_nan=name.startswith("float"))

    out = io.BytesIO(before)
    length = records.write_tensor(out, name, bits(tensor))
    assert out.getvalue()[: len(before)] == before
    again = torch.load(io.BytesIO(out.getvalue()[len(before) :]), weights_only=True)
    assert length == len(out.getvalue()) - len(before)
    assert again.dtype == tensor.dtype and torch.equal(again, tensor)


def test_views_are_read_as_what_they_show():
    whole = torch.arange(60.0).reshape(3, 4, 5)
    for view in (whole.T, whole[1:, ::2], whole.permute(1, 0, 2), whole[2, 3, 1]):
        data = saved(view)
        assert np.array_equal(records.read_tensor(io.BytesIO(data), 0, len(data))[1], view.numpy())


def test_objects_come_back_though_their_classes_are_unknown():
    from argparse import Namespace
    from collections import OrderedDict

    value = {"args": Namespace(layers=3, name="가"), "size": torch.Size([1, 2]), "kept": OrderedDict(a=[None, 1.5])}
    out = io.BytesIO()
    torch.save([value], out)
    found = records.read_object(out, 0, len(out.getvalue()))[0]
    assert found["args"].path == ("argparse", "Namespace") and found["args"].state == {"layers": 3, "name": "가"}
    found["args"].state["layers"] = 4
    out = io.BytesIO()
    records.write_object(out, [found])
    out.seek(0)
    assert torch.load(out, weights_only=False) == [{**value, "args": Namespace(layers=4, name="가")}]


def test_nothing_that_a_pickle_names_is_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return open, (str(tmp_path / "planted"), "w")

    records.load_pickle(pickle.dumps(Planted()))
    out = io.BytesIO()
    torch.save([Planted()], out)
    records.read_object(out, 0, len(out.getvalue()))
    assert not (tmp_path / "planted").exists()


class Reluctant(io.BytesIO):
    """A file that moves a thousand bytes a call, as the system moves 2 GiB at most."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:1000])

    def write(self, data):
        return super().write(memoryview(data)[:1000])


def test_calls_that_move_less_than_was_asked_for_are_repeated():
    values = np.arange(5000.0)
    file = Reluctant()
    length = records.write_tensor(file, "float64", values)
    assert np.array_equal(records.read_tensor(file, 0, length)[1], values)
    assert torch.equal(torch.load(io.BytesIO(file.getvalue())), torch.from_numpy(values))


def test_a_record_with_any_one_bit_flipped_is_read_or_refused():
    data = bytearray(saved(torch.arange(6.0)))
    for place in range(0, len(data), 3):
        data[place] ^= 1 << place % 8
        with contextlib.suppress(CherryError):
            records.read_tensor(io.BytesIO(data), 0, len(data))
        data[place] ^= 1 << place % 8


@pytest.mark.parametrize("cut", [0, 10, 300, 900])
def test_a_record_that_is_cut_off_is_refused(cut):
    data = saved(torch.arange(200.0))
    with pytest.raises(CherryError):
        records.read_tensor(io.BytesIO(data[:cut]), 0, len(data))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_noise_is_refused_in_one_sentence(noise):
    with contextlib.suppress(CherryError):
        records.load_pickle(noise)
    with pytest.raises(CherryError):
        records.read_object(io.BytesIO(noise), 0, len(noise))
