"""What will be used on a machine, and what `cherry doctor` says of it."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from cherry_megatron.versions import installed_version
from tests.conftest import HAS_GPU, run_ranks


def doctor(arguments: list[str]):
    import contextlib
    import io

    from cherry_megatron.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(["doctor", *arguments])
    return status, out.getvalue()


@pytest.mark.skipif(HAS_GPU, reason="describes a machine without GPU")
def test_doctor_on_a_cpu(tmp_path: Path, write_config):
    ((status, text),) = run_ranks(tmp_path, 1, doctor, ["--config", str(write_config(tmp_path))])
    assert status == 0
    for line in (
        "devices               CPU",
        "--transformer-impl local",
        "--distributed-backend gloo",
        "can run here",
    ):
        assert line in text


@pytest.mark.skipif(installed_version("nvidia-dali-cuda130") is None, reason="DALI is not installed")
@pytest.mark.parametrize(
    ("loader", "says"),
    [
        ("dali", "batches are read by DALI 2"),
        ("torch", "by torch's DataLoader, which data.loader dali would change"),
    ],
)
def test_doctor_says_what_reads(loader, says, tmp_path: Path, write_config):
    path = write_config(tmp_path, data={"loader": loader})
    ((status, text),) = run_ranks(tmp_path, 1, doctor, ["--config", str(path)])
    assert status == 0
    assert "nvidia-dali           used where data.loader is dali: 2." in text
    assert says in text


def doctor_of_a_broken_dali():
    import nvidia.dali

    def fail(*_args, **_kwargs):
        raise RuntimeError("no driver\nand more")

    nvidia.dali.Pipeline.run = fail
    return doctor([])


@pytest.mark.skipif(installed_version("nvidia-dali-cuda130") is None, reason="DALI is not installed")
def test_a_dali_that_does_not_run_is_not_usable(tmp_path: Path):
    ((status, text),) = run_ranks(tmp_path, 1, doctor_of_a_broken_dali)
    assert status == 0
    (line,) = [line for line in text.splitlines() if line.startswith("nvidia-dali")]
    assert line.split(maxsplit=1)[1].startswith("not usable: 2.") and line.endswith("does not run: no driver")


@pytest.mark.skipif(HAS_GPU, reason="describes a machine without GPU")
def test_doctor_names_every_obstacle(tmp_path: Path, write_config):
    path = write_config(tmp_path, megatron={"fp8-format": "hybrid", "bf16": True, "data-path": ["nowhere"]})
    ((status, text),) = run_ranks(tmp_path, 1, doctor, ["--config", str(path)])
    assert status == 1
    assert "FP8 needs Transformer Engine" in text
    assert "nowhere" in text


def doctor_twice(path: Path, prefix: Path) -> list[tuple[int, str]]:
    """Of data as it was written, and with other tokens of the same number."""
    arguments = ["--config", str(path), "--verify"]
    before = doctor(arguments)
    tokens = bytearray(prefix.with_suffix(".bin").read_bytes())
    tokens[len(tokens) // 2] ^= 1
    prefix.with_suffix(".bin").write_bytes(tokens)
    return [before, doctor(arguments), doctor(arguments[:2])]


@pytest.mark.skipif(HAS_GPU, reason="describes a machine without GPU")
def test_doctor_compares_the_hashes_of_data(tmp_path: Path, write_config, data):
    for end in ("bin", "idx", "json"):
        shutil.copy(data / f"text.{end}", tmp_path)
    path = write_config(tmp_path, megatron={"data-path": [str(tmp_path / "text")]})
    ((whole, changed, unlooked),) = run_ranks(tmp_path / "output", 1, doctor_twice, path, tmp_path / "text")
    assert (whole[0], unlooked[0]) == (0, 0) and "can run here" in whole[1]
    size = sum((data / f"text.{end}").stat().st_size for end in ("bin", "idx"))
    assert f"verified: 2 files of data, {size:,} bytes, are what was written\n" in whole[1]
    assert "verified" not in changed[1] + unlooked[1]
    assert changed[0] == 1 and f"{tmp_path}/text.bin is not what was written: text.json has another" in changed[1]
    report = tmp_path / "text.json"
    report.write_text(json.dumps({k: v for k, v in json.loads(report.read_text()).items() if k != "sha256"}))
    ((old, *_),) = run_ranks(tmp_path / "output", 1, doctor_twice, path, tmp_path / "text")
    assert old[0] == 1 and "has no hashes, with which" in old[1]


def test_the_apex_of_pypi_is_not_nvidias(monkeypatch):
    from cherry_megatron.platform import machine

    monkeypatch.setattr(machine, "installed_version", lambda name: "0.9.10" if name == "apex" else None)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    library = machine._apex(has_gpu=True)
    assert not library.usable
    assert "not NVIDIA's apex" in library.note


def ranks_from_slurm(environment):
    import os

    from cherry_megatron.platform.machine import _ranks

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    _ranks()
    return [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]


def test_ranks_come_from_srun(tmp_path: Path):
    srun = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert run_ranks(tmp_path / "srun", 1, ranks_from_slurm, srun) == [["5", "8", "1"]]
    assert run_ranks(tmp_path / "alone", 1, ranks_from_slurm, {}) == [["0", "1", "0"]]
