"""All or nothing: kills, full disks, and everything else that can be wrong with source or target."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from cherry_megatron import files
from cherry_megatron.cli import main
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.surgery import compress, writing
from tests.surgery.conftest import model_tensors, save


def command(folder: Path, *arguments: str) -> list[str]:
    """compress-depth of folder/deep into folder/small."""
    base = ["compress-depth", "--load", str(folder / "deep"), "--save", str(folder / "small")]
    return [*base, "--config", str(folder / "config.yaml"), "--workers", "2", *arguments]


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def deep(tmp_path, config) -> Path:
    """A source of 8 layers and a configuration for 4; returns their folder."""
    save(tmp_path / "deep", model_tensors(8))
    config()
    return tmp_path


# Killed


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.full)])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_or_none(kills, tmp_path, config):
    tensors = {name: tensor.repeat(*[40] * tensor.ndim) for name, tensor in model_tensors(8).items()}
    save(tmp_path / "deep", tensors)
    content = yaml.safe_load(config().read_text())
    content["megatron"] = {"swiglu": True, "untie-embeddings-and-output-weights": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    source = state(tmp_path / "deep")
    run = [sys.executable, "-m", "cherry_megatron.cli", *command(tmp_path)]
    began = time.perf_counter()
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    whole, seconds = describe(tmp_path / "small", verify=True)[0][:12], time.perf_counter() - began
    shutil.rmtree(tmp_path / "small")

    draw, finished = random.Random(0), 0
    for trial in range(kills):
        process = subprocess.Popen(
            run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        # The moment is drawn from the whole run; nothing below depends on which it was.
        with_workers = trial % 2
        time.sleep(draw.uniform(0, seconds))
        if with_workers:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        if (tmp_path / "small").exists():
            assert describe(tmp_path / "small", verify=True)[0][:12] == whole
            shutil.rmtree(tmp_path / "small")
            finished += 1
    assert finished < kills, "no kill came in time"
    assert state(tmp_path / "deep") == source
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    assert describe(tmp_path / "small", verify=True)[0][:12] == whole
    assert not list(tmp_path.glob(".small*"))


def test_two_runs_do_not_write_one_checkpoint(deep, capsys):
    with files.new_folder(deep / "small", 0):
        assert main(command(deep)) == 2
    assert "another run is writing" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["write_flushed", "hash_file", "sync_folder"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6])
def test_a_kill_between_any_two_steps_of_publishing_is_made_good(step, nth, deep, monkeypatch):
    whole = publish_in_child(deep, "whole", None, 0)
    before = describe(deep / "whole", verify=True)[0][:12]
    assert (whole and not publish_in_child(deep, "small", step, nth)) or (deep / "small").exists()
    if not (deep / "small").exists():
        assert main(command(deep)) == 0
    assert describe(deep / "small", verify=True)[0][:12] == before
    assert not list(deep.glob(".small*"))


def publish_in_child(folder: Path, name: str, step: str | None, nth: int) -> bool:
    """Compress in a process that dies at the n-th call of one of publish's steps; False if it did."""
    child = os.fork()
    if not child:
        if step is not None:
            original, calls = getattr(writing, step), iter(range(1, 1000))

            def die_or(*arguments: object) -> object:
                if next(calls) == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments)

            setattr(writing, step, die_or)
        os._exit(main(command(folder, "--save", str(folder / name))))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_second_run_cannot_take_the_lock_while_the_first_publishes(deep, monkeypatch, capsys):
    sync_folder, results = writing.sync_folder, []

    def run_meanwhile(folder: Path) -> None:
        monkeypatch.setattr(writing, "sync_folder", sync_folder)
        results.append(main(command(deep)))
        sync_folder(folder)

    monkeypatch.setattr(writing, "sync_folder", run_meanwhile)
    assert main(command(deep)) == 0 and results == [2]
    assert "another run is writing" in capsys.readouterr().err
    assert describe(deep / "small", verify=True)


# Refused


def drop(tensors, name):
    del tensors[name]


def add(tensors, name):
    tensors[name] = torch.zeros(3)


def halve(tensors, name):
    tensors[name] = tensors[name].bfloat16()


def cut(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


FC1, QKV = "decoder.layers.5.mlp.linear_fc1.weight", "decoder.layers.2.self_attention.linear_qkv.weight"
SOURCES = {
    "missing-tensor": (lambda t: drop(t, FC1), "the tensor mlp.linear_fc1.weight is missing"),
    "missing-embedding": (
        lambda t: drop(t, "embedding.word_embeddings.weight"),
        "embedding.word_embeddings.weight",
    ),
    "missing-layer": (
        lambda t: [drop(t, n) for n in list(t) if n.startswith("decoder.layers.7.")],
        "the layer 7 is missing",
    ),
    "bias": (lambda t: add(t, "decoder.layers.0.self_attention.linear_qkv.bias"), "linear_qkv.bias is not one of"),
    "unknown-tensor": (lambda t: add(t, "vision.weight"), "vision.weight is not known"),
    "mixed-types": (lambda t: halve(t, FC1), "is bfloat16, but"),
    "other-shape": (lambda t: cut(t, FC1), "is [39, 24], not [40, 24]"),
    "recurrent-already": (lambda t: add(t, "decoder.layers.3.mlp_bda.loop_scale"), "is a recurrent model already"),
    "infinite": (lambda t: t[QKV].fill_(float("inf")), "the mean is not finite"),
    "whole-numbers": (
        lambda t: t.update({n: values.int() for n, values in t.items()}),
        "is of the type int32, which cannot be averaged",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_does_not_fit_is_refused(name, tmp_path, config, capsys):
    change, says = SOURCES[name]
    tensors = model_tensors(8)
    change(tensors)
    save(tmp_path / "deep", tensors)
    config()
    refused(tmp_path, says, capsys)


def refused(folder: Path, says: str, capsys, *arguments: str) -> None:
    before = state(folder)
    assert main(command(folder, *arguments)) == 2
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("cherry ")]
    assert len(lines) == 1 and says in lines[0] and "Traceback" not in "".join(errors), errors
    assert state(folder) == before


def test_a_shard_that_is_cut_off_is_refused_before_anything_is_written(deep, capsys):
    shard = max((deep / "deep/iter_0000007").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    refused(deep, f"{shard} is truncated", capsys)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_file_that_ends_before_the_arguments_of_the_training_is_said_to(deep, capsys, share):
    source = open_checkpoint(deep / "deep")
    (place,) = source.objects.values()
    shard, end = source.folder / place.file, place.offset + place.length
    os.truncate(shard, place.offset + int(share * place.length))
    size = shard.stat().st_size
    refused(deep, f"{shard} is truncated: it has {size} bytes, and at least {end} by .metadata", capsys)


def test_a_shard_that_is_gone_is_named(deep, capsys):
    shard = next((deep / "deep/iter_0000007").glob("*.distcp"))
    shard.unlink()
    refused(deep, f"{shard} is missing", capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--load", "nowhere"], "nowhere does not exist; correct the path"),
        (["--groups", "0-1,2-3"], "names 2 groups"),
        (["--method", "median"], "--method median is not one of average, weighted, select"),
        (["--method", "weighted", "--weights", "1,2,3"], "names 3 weights, but a group has 2 layers"),
        (["--workers", "-1"], "--workers -1 is negative"),
        (["--optimizer", "average"], "holds no optimizer state"),
        (["--optimizer", "average", "--align", "weights"], "are not carried"),
        (
            ["--set", "recurrence.pattern='(*-)x9'"],
            "config.yaml: recurrence.pattern (*-)x9 has 9 layers, and the source only 8; use no more",
        ),
        (
            ["--set", "recurrence.pattern='(*-)x9'", "--expand"],
            "holds 8 layers, recurrence.pattern 9 ((*-)x9); set",
        ),
        (
            ["--set", "recurrence.loop_rank=4000"],
            "config.yaml: recurrence.loop_rank 4000 is more than megatron.hid",
        ),
        (["--set", "recurrence.loop_rank=21"], "config.yaml: recurrence.loop_rank is 21, but mlp.linear_fc2 of"),
        (["--set", "megatron.hidden-size=32"], "megatron.hidden-size is 32, but PATH has 24; set it so"),
        (["--set", "megatron.ffn-hidden-size=16"], "megatron.ffn-hidden-size is 16, but"),
        (["--set", "megatron.padded-vocab-size=64"], "megatron.padded-vocab-size is 64, but"),
        (["--set", "megatron.num-attention-heads=4"], "4 heads and 2 query groups"),
        (
            ["--set", "megatron.num-attention-heads=10"],
            "config.yaml: megatron.hidden-size 24 is not a multiple of num-attention-heads 10; use a number of",
        ),
        (["--set", "recurrence.pattern='*[*]x4*'"], "layer 0 is '*-', but recurrence.pattern wants '*'"),
        (["--set", "megatron.swiglu=false"], "megatron.swiglu is False"),
        (["--set", "megatron.untie-embeddings-and-output-weights=false"], "holds a output_layer.weight"),
        (
            ["--set", "megatron.rotary-base=500000"],
            "is 500000, but PATH was trained with 10000; set it so, or name megatron.rotary-base in `changed`",
        ),
        (["--set", "changed=[megatron.lr]"], "`changed` cannot name megatron.lr; "),
        (["--set", "changed=[megatron.rotary_base]"], "megatron.rotary_base; did you mean 'megatron.rotary-base'?"),
        (["--set", "megatron.norm-epsilon=1.0e-6"], "trained with 1e-05; set it so, or"),
        (["--expand"], "holds 8 layers, recurrence.pattern 4"),
        (["--set", "recurrence.lops=3"], "did you mean 'loops'"),
        (["--set", "megatron.hiden-size=24"], "unknown key megatron.hiden-size; did you mean 'hidden-size'"),
        (["--set", "megatron.hidden-size=24.0"], "hidden-size is '24.0'; it takes a whole number: write 24"),
        (
            ["--set", "megatron.train-iters=many"],
            "config.yaml: megatron.train-iters is 'many'; it takes a whole number",
        ),
        (
            ["--set", "megatron.window-size=[8, 0]"],
            "window-size is [8, 0]; it takes one value, without brackets: 8,0",
        ),
        (["--set", "megatron.no-rope-freq=[0, 1]"], 'it takes one value, in quotes and without spaces: "[0,1]"'),
        (["--set", "megatron.lr=fast"], "config.yaml: megatron.lr is 'fast'; it takes a number"),
        (["--set", "megatron.swiglu=1"], "megatron.swiglu is 1; it is a switch: use true or false"),
        (["--set", "megatron.num-layers=4"], "megatron.num-layers follows from `recurrence.pattern`"),
        (["--set", "megatron.normalization=LayerNorm"], "megatron.normalization must be RMSNorm"),
        (["--set", "moee.experts=2"], "moee makes a mixture; take moee out"),
        (["--set", "moee.experts=2", "--expand"], "moee makes a mixture; take moee out"),
        (
            ["--set", "megatron.group-query-attention=false"],
            "megatron.num-query-groups 2 does nothing without group-query-attention; set that to true",
        ),
        (["--set", "evaluation.lops=3"], "unknown key evaluation.lops; did you mean 'loops'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(deep, capsys, arguments, says):
    refused(deep, says.replace("PATH", str(deep / "deep/iter_0000007")), capsys, *arguments)


def test_numbers_may_be_written_as_megatron_reads_them(deep):
    """YAML takes 1e-5, without a point, for a text."""
    assert main(command(deep, "--set", "megatron.norm-epsilon=1e-5", "--set", "megatron.hidden-size='24'")) == 0


TAKEN = {
    "taken": (lambda folder: (folder / "small").write_text("mine"), "small exists and is not empty"),
    "link": (lambda folder: (folder / "small").symlink_to(folder / "other"), "small is a symbolic link"),
    "link-to-an-empty-folder": (
        lambda folder: [(folder / "other").mkdir(), (folder / "small").symlink_to("other")],
        "name the folder that it leads to",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_target_that_is_taken_is_said_after_all_else(name, deep, capsys):
    """It hides no other mistake; `--dry-run` says it behind the plan."""
    prepare, says = TAKEN[name]
    prepare(deep)
    refused(deep, "unknown key recurrence.lops", capsys, "--set", "recurrence.lops=3")
    refused(deep, "holds no optimizer state", capsys, "--optimizer", "average")
    refused(deep, says, capsys)
    before = state(deep)
    assert main(command(deep, "--dry-run")) == 2
    said = capsys.readouterr()
    assert "layer 0     prelude  from 0, 1" in said.out and says in said.err and state(deep) == before


TARGETS = {
    "inside-the-source": (None, "deep/small", "deep/small is inside"),
    "inside-by-a-link": (lambda folder: (folder / "link").symlink_to("deep"), "link/small", "which is only read"),
    "the-source": (None, "deep", "deep, which is only read; choose a folder beside it"),
    "below-a-file": (
        lambda folder: (folder / "file").write_text("in the way"),
        "file/small",
        "file is not a folder; choose another place",
    ),
    "nowhere": (None, "/proc/small", "cannot write --save /proc/small: /proc takes no new folder ("),
}


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_cannot_be_is_refused_before_the_source_is_read(name, more, deep, capsys, monkeypatch):
    prepare, target, says = TARGETS[name]
    if prepare is not None:
        prepare(deep)
    monkeypatch.setattr(compress, "plan_compression", None)
    refused(deep, says, capsys, "--save", str(deep / target), *more)


@pytest.mark.parametrize("verb", ["compress-depth", "assemble-moee"])
def test_a_target_without_a_name_is_refused(verb, deep, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--load", str(deep / "deep"), "--config", str(deep / "config.yaml"), "--save", ""])
    assert stopped.value.code == 2
    assert "argument --save: it is empty; name the folder to write" in capsys.readouterr().err


def test_a_target_that_is_there_is_not_touched(deep, capsys):
    (deep / "small").mkdir()
    (deep / "small/notes.txt").write_text("mine")
    refused(deep, "small exists and is not empty", capsys)


def test_no_room_is_seen_before_anything_is_written(deep, capsys, monkeypatch):
    usage = shutil.disk_usage(deep)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(deep, "no space left for", capsys)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_fills_up_is_one_sentence(deep, capsys, monkeypatch):
    mounted = deep / "disk"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mounted], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        usage = shutil.disk_usage(deep)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # as if another program took the room meanwhile
        refused(deep, "no space left for", capsys, "--save", str(mounted / "small"))
        assert not list(mounted.iterdir())
    finally:
        subprocess.run(["umount", mounted], check=True)
