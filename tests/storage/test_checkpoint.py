"""A checkpoint that is not whole is not read."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.storage import checkpoint as checkpoints
from cherry_megatron.storage.checkpoint import Checkpoint, Chunk, Place, Tensor, _is_whole, open_checkpoint
from cherry_megatron.surgery import compress
from tests.surgery.conftest import model_tensors, save


def tensor(shape: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    return Tensor("it", "float32", shape, tuple(Chunk(at, size, Place("file", 0, 0)) for at, size in chunks))


@st.composite
def divided(draw):
    """A shape, and the chunks that cuts along each dimension make of it."""
    cuts = [
        sorted(draw(st.sets(st.integers(1, 6), min_size=1, max_size=4))) for _ in range(draw(st.integers(0, 3)))
    ]
    chunks = [((), ())]
    for found in cuts:
        parts = [(a, b - a) for a, b in zip([0, *found], found, strict=False)]
        chunks = [((*at, start), (*size, width)) for at, size in chunks for start, width in parts]
    return tuple(found[-1] for found in cuts), chunks


@given(divided(), st.randoms(use_true_random=False))
def test_a_tensor_is_whole_if_each_value_is_in_one_chunk(found, random):
    shape, chunks = found
    random.shuffle(chunks)
    assert _is_whole(tensor(shape, chunks))
    one = random.randrange(len(chunks))
    assert not _is_whole(tensor(shape, [*chunks, chunks[one]])), "twice"
    if shape:
        assert not _is_whole(tensor(shape, [c for k, c in enumerate(chunks) if k != one]))
        at, size = chunks[one]
        moved = ((at[0] + 1, *at[1:]), size)
        assert not _is_whole(tensor(shape, [*(c for k, c in enumerate(chunks) if k != one), moved]))


def test_a_tensor_that_the_manifest_has_and_the_checkpoint_has_not_is_named(tmp_path, config):
    save(tmp_path / "deep", model_tensors(8))
    compress.plan_compression(tmp_path / "deep", config(), (), compress.Options()).run(tmp_path / "small", 2)
    folder = tmp_path / "small/iter_0000000"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["decoder.layers.8.mlp.linear_fc1.weight"] = {"0,0": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CherryError, match=r"lacks the tensor decoder.layers.8.mlp.linear_fc1.weight of its manifest"
    ):
        Checkpoint(folder)


def test_a_stack_without_one_of_its_layers_is_refused():
    chunks = [((layer, 0), (1, 4)) for layer in (0, 2)]
    with pytest.raises(CherryError, match="has no part for layer 1"):
        checkpoints._unstacked(Tensor("decoder.layers.mlp.x", "float32", (3, 4), tensor((3, 4), chunks).chunks))


@pytest.mark.parametrize("common", [{"iteration": 7}, {"args": {"num_layers": 4}}, None])
def test_a_checkpoint_that_no_training_saved_is_refused_by_a_sentence(common, tmp_path, config):
    state = {**model_tensors(8), "common_state/shard_0_1": [common]}
    writer = dcp.FileSystemWriter(tmp_path / "deep/iter_0000007")
    dcp.save(state, storage_writer=writer, planner=dcp.DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    (tmp_path / "deep/latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CherryError, match="holds no arguments of a training"):
        compress.plan_compression(tmp_path / "deep", config(), (), compress.Options())


def test_the_state_of_several_optimizers_is_not_the_models(tmp_path):
    save(tmp_path / "deep", {**model_tensors(2), "chained_0.optimizer.state.exp_avg.x": torch.zeros(3)})
    assert Checkpoint(tmp_path / "deep/iter_0000007").model.keys() == model_tensors(2).keys()


@pytest.mark.parametrize(
    "content", [b"\x00\xff", b"", b"N.", b"cos\nsystem\n(S'touch hacked'\ntR.", b"(dp0\nS'state'\nNs."]
)
def test_a_description_that_is_none_is_refused_with_what_to_do(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "deep", model_tensors(2))
    (tmp_path / "deep/iter_0000007/.metadata").write_bytes(content)
    with pytest.raises(
        CherryError, match=r"\.metadata is not that of a torch_dist checkpoint .*; restore the check"
    ):
        open_checkpoint(tmp_path / "deep")
    assert not (tmp_path / "hacked").exists()


def test_what_is_missing_around_a_checkpoint_is_named(tmp_path):
    run = tmp_path / "run"
    saved = save(run / "checkpoints", model_tensors(2))
    assert open_checkpoint(run).folder == saved / "iter_0000007"
    (saved / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CherryError, match=r"holds iter_0000007 without integrity\.json, whose save did not"):
        open_checkpoint(run)
    (saved / "iter_0000007/integrity.json").write_text("{}")
    for path in (run, saved):
        with pytest.raises(CherryError) as found:
            open_checkpoint(path)
        assert str(found.value) == (
            f"{path} holds iter_0000007, but latest_checkpointed_iteration.txt is missing; write the number of the "
            f"checkpoint to take into {saved / 'latest_checkpointed_iteration.txt'}"
        )
    (saved / "latest_checkpointed_iteration.txt").write_text("7")
    (saved / "iter_0000007/metadata.json").write_text("{}")
    (saved / "iter_0000007/.metadata").unlink()
    for path in (run, saved, saved / "iter_0000007"):
        with pytest.raises(CherryError, match=r"iter_0000007/\.metadata is missing; restore the checkpoint$"):
            open_checkpoint(path)
    with pytest.raises(CherryError, match="none does not exist; correct the path"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "none").mkdir()
    with pytest.raises(CherryError, match="none: no checkpoint there"):
        open_checkpoint(tmp_path / "none")
