"""The built wheel, installed away from the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARTER = "cherry_megatron/starter"
FEW = ("train-iters=2", "global-batch-size=4", "micro-batch-size=4", "lr-warmup-iters=1", "eval-iters=1")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as a release is: from the archive of the sources, by what is installed here."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a program elsewhere, in an environment that has the wheel and the other packages of this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    # PYTHONPATH leads to the repository, where its package would be found and not the wheel's.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], env=kept, check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    # Of a folder that is named so the packages are found, but not what is installed in place, such as this project.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(*command: str, **variables: str) -> str:
        path = f"{environment / 'bin'}{os.pathsep}{kept['PATH']}"
        done = subprocess.run(
            ["env", *command],  # which looks on the path that it is given
            cwd=folder, env={**kept, "PATH": path, **variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    where = run("python", "-c", "import cherry_megatron; print(cherry_megatron.__file__)")
    assert Path(where.strip()).is_relative_to(environment)
    return run


def test_a_wheel_holds_every_file_of_the_package_and_what_a_user_begins_with(wheel):
    held = {path for path in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in path}
    ours = {
        str(Path(place, path.relative_to(ROOT)))
        for folder, place in (("cherry_megatron", ""), ("configs", STARTER), ("slurm", STARTER))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "cluster.env"  # somebody's account
    }
    assert len(ours) > 150 and held == ours


@pytest.mark.full
def test_an_installed_package_begins_trains_and_selects_without_the_repository(installed, data, tmp_path):
    assert "cherry-megatron" in installed("cherry", "doctor")
    installed("cherry", "init")
    assert "6 stored layers, 34 effective" in installed("cherry", "params", "configs/cherry_227m.yaml")
    text = shutil.copytree(data, tmp_path / "data") / "text"  # the marks lie beside it
    tokenizer = str(data / "tokenizer")
    installed("cherry", "select", "--data", str(text), "--selector", "semantic", "--tokenizer", tokenizer)
    ours = {"CHERRY_TOKENIZER": tokenizer, "CHERRY_DATA": str(text)}
    few = [argument for setting in FEW for argument in ("--set", f"megatron.{setting}")]
    installed("cherry", "pretrain", "--config", "configs/cherry_tiny.yaml", *few, **ours)
    assert "2 of 2" in installed("cherry", "status", "runs/tiny")
    told = installed("cherry", "lineage", "runs/tiny")
    assert f"code {version('cherry-megatron')}  runs/tiny/checkpoints/iter_0000002" in told


@pytest.mark.full
def test_the_launchers_that_an_installed_package_brings_start_its_program(installed):
    installed("cherry", "init", "cluster")
    said = installed("bash", "cluster/slurm/pretrain_cherry_1p8b.sh", DRY_RUN="1")
    (line,) = (line for line in said.splitlines() if line.startswith("srun "))
    assert "cherry pretrain --config" in line and "elsewhere0/cluster/configs/cherry_1p8b.yaml" in line
