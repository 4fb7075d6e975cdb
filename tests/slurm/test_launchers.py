"""The SLURM launch scripts: what they would submit."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.launching import ROOT, SCRIPT, launch


def dry_run(project: Path, env: dict[str, str], *args: str, script: str = SCRIPT) -> tuple[list[str], list[str]]:
    """The words of the printed sbatch and srun commands."""
    done = launch(project, {**env, "DRY_RUN": "1"}, *args, script=script)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert not (project / "runs").exists(), "a dry run leaves nothing behind"
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert [command[0] for command in commands] == ["sbatch", "srun"]
    return commands[0], commands[1]


def recording_sbatch(folder: Path) -> None:
    """In its `bin`, an sbatch that writes where it was called and with what into its `given`."""
    (folder / "bin").mkdir()
    sbatch = folder / "bin/sbatch"
    sbatch.write_text(f"#!/bin/bash\npwd >'{folder}/given'\nprintf '%s\\0' sbatch \"$@\" >>'{folder}/given'\n")
    sbatch.chmod(0o755)


def options(words: list[str]) -> dict[str, str]:
    """The long options up to the script or command."""
    found = {}
    for word in words[1:]:
        if not word.startswith("--"):
            break
        name, _, value = word[2:].partition("=")
        assert name not in found, f"--{name} is given twice"
        found[name] = value
    return found


def test_defaults_are_the_sbatch_lines(project: Path, no_slurm: dict[str, str]) -> None:
    sbatch, srun = dry_run(project, no_slurm)
    assert options(sbatch) == {
        "job-name": "cherry-pretrain", "nodes": "1", "gpus-per-node": "8", "ntasks-per-node": "8",
        "cpus-per-task": "8", "time": "24:00:00", "signal": "TERM@120", "requeue": "", "open-mode": "append",
        "output": f"{project}/runs/cherry_1p8b/logs/slurm-%j.out",
    }  # fmt: skip
    assert sbatch[-2:] == [f"{project}/{SCRIPT}", f"{project}/configs/cherry_1p8b.yaml"]
    assert options(srun) == {
        "nodes": "1", "ntasks": "8", "ntasks-per-node": "8", "cpus-per-task": "8", "kill-on-bad-exit": "1",
        "open-mode": "append", "output": f"{project}/runs/cherry_1p8b/logs/slurm-%j-%t.out",
    }  # fmt: skip
    assert srun[-4:] == ["cherry", "pretrain", "--config", f"{project}/configs/cherry_1p8b.yaml"]


def test_settings_from_the_environment(project: Path, no_slurm: dict[str, str]) -> None:
    settings = {
        "CLUSTER_ACCOUNT": "physics", "CLUSTER_PARTITION": "gpu", "CLUSTER_TIME": "1-0", "CLUSTER_NODES": "16",
        "CLUSTER_GPUS_PER_NODE": "h100:4", "CLUSTER_CPUS_PER_TASK": "12", "CLUSTER_VENV": "/venv",
        "CLUSTER_SBATCH_OPTIONS": "--qos=long --dependency=singleton", "CLUSTER_SRUN_OPTIONS": "--mpi=none",
    }  # fmt: skip
    sbatch, srun = dry_run(project, {**no_slurm, **settings})
    found = options(sbatch)
    expected = {
        "account": "physics", "partition": "gpu", "time": "1-0", "nodes": "16", "gpus-per-node": "h100:4",
        "ntasks-per-node": "4", "cpus-per-task": "12", "qos": "long", "dependency": "singleton",
    }  # fmt: skip
    assert expected.items() <= found.items()
    expected = {"nodes": "16", "ntasks": "64", "ntasks-per-node": "4", "cpus-per-task": "12", "mpi": "none"}
    assert expected.items() <= options(srun).items()
    assert srun[-4] == "/venv/bin/cherry"


def test_settings_from_the_file(project: Path, no_slurm: dict[str, str]) -> None:
    (project / "slurm/cluster.env").write_text(
        '# ours\nCLUSTER_ACCOUNT=physics  # the group\'s\nCLUSTER_NODES=4\nCHERRY="$PWD/it -v"\n'
    )
    sbatch, srun = dry_run(project, {**no_slurm, "CLUSTER_NODES": "2", "CHERRY": "mine"})
    assert {"account": "physics", "nodes": "2"}.items() <= options(sbatch).items(), "the environment wins"
    assert "mine" in srun
    sbatch, srun = dry_run(project, no_slurm)
    assert options(sbatch)["nodes"] == "4"
    assert options(srun)["ntasks"] == "32"


def test_configuration_and_overrides(project: Path, no_slurm: dict[str, str]) -> None:
    arguments = ["configs/dense_566m.yaml", "--set", "recurrence.order=cycle", "--", "--lr", "1e-4"]
    sbatch, srun = dry_run(project, no_slurm, *arguments)
    assert options(srun)["output"] == f"{project}/runs/dense_566m/logs/slurm-%j-%t.out"
    assert sbatch[-6:] == [f"{project}/{arguments[0]}", *arguments[1:]]
    assert srun[-8:] == ["pretrain", "--config", f"{project}/{arguments[0]}", *arguments[1:]]


def test_a_dry_run_prints_what_is_submitted(project: Path, no_slurm: dict[str, str], tmp_path: Path) -> None:
    """To the word, whatever is in them, and what reaches the job besides."""
    recording_sbatch(tmp_path)
    (project / "my config.yaml").write_text("extends: configs/cherry_tiny.yaml\n")
    odd = [
        "my config.yaml",
        "--set",
        "run=runs/my 'own'  $run",
        "--set",
        'megatron.data-path=["a  b", *]',
        "--",
        "--lr",
        '"1"',
    ]
    printed, srun = dry_run(project, {**no_slurm, "CLUSTER_ACCOUNT": "two words"}, *odd)
    done = launch(
        project, {**no_slurm, "CLUSTER_ACCOUNT": "two words", "PATH": f"{tmp_path}/bin:{no_slurm['PATH']}"}, *odd
    )
    assert done.returncode == 0, done.stderr
    folder, _, given = (tmp_path / "given").read_text().partition("\n")
    assert given.split("\0")[:-1] == printed and folder == str(project)
    assert printed[-8:] == srun[-8:] == [f"{project}/{odd[0]}", *odd[1:]]
    assert options(printed)["output"] == f"{project}/runs/my 'own'  $run/logs/slurm-%j.out"
    env = {**no_slurm, "DRY_RUN": "1", "LOAD": "runs/a runs/b"}
    said = launch(project, env, script="slurm/assemble_moee.sh").stdout
    assert f"# submitted, from {project}, with LOAD=runs/a runs/b, with FROM=configs/branch_227m.yaml:\n" in said


def test_run_folder(project: Path, no_slurm: dict[str, str]) -> None:
    """Logs go where `cherry pretrain` keeps the run: as the file says, what it extends, or --set."""
    _, srun = dry_run(project, no_slurm, "configs/base_1b.yaml", "--set", "run=runs/second")
    assert options(srun)["output"] == f"{project}/runs/second/logs/slurm-%j-%t.out"
    (project / "child.yaml").write_text("extends: configs/cherry_tiny.yaml\n")
    _, srun = dry_run(project, no_slurm, "child.yaml")
    assert options(srun)["output"] == f"{project}/runs/tiny/logs/slurm-%j-%t.out"
    (project / "child.yaml").write_text("extends: configs/cherry_tiny.yaml\nrun: '/runs/my own'  # here\n")
    _, srun = dry_run(project, no_slurm, "child.yaml")
    assert options(srun)["output"] == "/runs/my own/logs/slurm-%j-%t.out"
    (project / "child.yaml").write_text("run: ${HOME}/${NOBODY_SETS_IT:-two}/${HOME}\n")
    _, srun = dry_run(project, no_slurm, "child.yaml")
    assert options(srun)["output"] == "/home/someone/two//home/someone/logs/slurm-%j-%t.out"


@pytest.mark.parametrize(
    ("script", "verb", "config", "gpus", "extra"),
    [
        ("pretrain_base_1b", "pretrain", "base_1b", True, {"signal": "TERM@120"}),
        ("compress_depth", "compress-depth", "recover_227m", False, {}),
        ("recover_227m", "pretrain", "branch_227m", True, {"signal": "TERM@120", "array": "0-7"}),
        ("assemble_moee", "assemble-moee", "cherry_1p8b", False, {}),
        ("sgt_finetune", "pretrain", "sgt_1p8b", True, {"signal": "TERM@120"}),
        ("evaluate", "evaluate", "cherry_1p8b", True, {}),
    ],
)
def test_stages(
    project: Path, no_slurm: dict[str, str], script: str, verb: str, config: str, gpus: bool, extra: dict[str, str]
) -> None:
    """Each launcher's own verb, configuration and options; what needs no GPU runs once, whatever the settings."""
    settings = {"CLUSTER_NODES": "2", "CLUSTER_GPUS_PER_NODE": "4"}
    sbatch, srun = dry_run(project, {**no_slurm, **settings}, script=f"slurm/{script}.sh")
    found = options(sbatch)
    assert {"requeue": "", "open-mode": "append", **extra}.items() <= found.items()
    assert ("array" in found, "signal" in found) == ("array" in extra, "signal" in extra)
    assert (found["nodes"], found.get("gpus-per-node")) == (("2", "4") if gpus else ("1", None))
    assert (options(srun)["ntasks"]) == ("8" if gpus else "1")
    assert srun[-3:] == [verb, "--config", f"{project}/configs/{config}.yaml"]


def test_array_of_branches(project: Path, no_slurm: dict[str, str]) -> None:
    env = {**no_slurm, "BRANCHES": "0,3", "AFTER": "17"}
    sbatch, _ = dry_run(project, env, script="slurm/recover_227m.sh")
    found = options(sbatch)
    assert found["output"] == f"{project}/runs/branch_227m/%a/logs/slurm-%j.out"
    assert (found["array"], found["dependency"], found["kill-on-invalid-dep"]) == ("0,3", "afterok:17", "yes")


def test_branches_are_those_of_the_launcher_that_is_an_array(project: Path, no_slurm: dict[str, str]) -> None:
    sbatch, _ = dry_run(project, {**no_slurm, "BRANCHES": "0-3"}, script="slurm/pretrain_base_1b.sh")
    assert "array" not in options(sbatch)
    done = launch(project, {**no_slurm, "BRANCHES": "7-3"}, script="slurm/recover_227m.sh")
    assert (done.returncode, done.stdout) == (2, "") and not (project / "runs").exists()
    assert done.stderr.endswith("the array 7-3 has no task; write it as 0-3,5\n")


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("slurm/evaluate.sh", ["--set", "recurrence.looops=4"], "looops"),
        ("slurm/assemble_moee.sh", ["configs/cherry_227m.yaml"], "cherry_227m.yaml is no mixture"),
    ],
)
def test_a_dry_run_refuses_what_a_submission_would(
    script: str, arguments: list[str], told: str, project: Path, no_slurm: dict[str, str]
) -> None:
    """Where `cherry` can be called."""
    env = {**no_slurm, "DRY_RUN": "1", "CHERRY": f"{sys.executable} -m cherry_megatron.cli"}
    done = launch(project, env, *arguments, script=script)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr and done.stderr.count("\n") == 1


def test_chain_without_slurm(
    project: Path, no_slurm: dict[str, str], stub: Callable[[str], dict[str, str]]
) -> None:
    """DRY_RUN prints every submission, each after the one before, and the table."""
    env = {
        **no_slurm,
        **stub(""),
        "DRY_RUN": "1",
        "PATH": os.environ["PATH"],
        "SGT_CONFIG": "configs/sgt_1p8b.yaml",
    }
    done = launch(project, env, script="slurm/submit_cherry.sh")
    assert done.returncode == 0, done.stderr
    submitted = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("sbatch ")]
    names = ["base", "compress", "recover", "assemble", "mixture", "sgt", "evaluate"]
    assert [options(words).get("dependency") for words in submitted] == [
        None, *(f"afterok:JOB_{name}" for name in names[:-1]),
    ]  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()[-8:]] == ["stage", *names]
    assert not (project / "runs").exists()


def test_container(project: Path, no_slurm: dict[str, str]) -> None:
    settings = {"CLUSTER_CONTAINER": "image.sqsh", "CLUSTER_CONTAINER_MOUNTS": "/data:/data"}
    _, srun = dry_run(project, {**no_slurm, **settings})
    expected = {
        "container-image": "image.sqsh", "container-workdir": str(project),
        "container-mounts": f"{project}:{project},/data:/data",
    }  # fmt: skip
    assert expected.items() <= options(srun).items()
    assert srun[-4] == "cherry", "the image's own"


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        (["configs/none.yaml"], {}, "no configuration configs/none.yaml"),
        (["configs/none.yaml"], {"DRY_RUN": "1"}, "no configuration configs/none.yaml"),
        (["--lr", "1"], {}, "'--lr'; Megatron's flags follow after --"),
        (["--set"], {}, "--set needs KEY=VALUE"),
        (["unnamed.yaml"], {}, "names no run folder"),
        (["orphan.yaml"], {}, "orphan.yaml extends"),
        (["variable.yaml"], {}, "needs the variable NOBODY_SETS_IT"),
        ([], {}, "there is no sbatch here"),
    ],
)
def test_mistakes_are_one_sentence(
    project: Path, no_slurm: dict[str, str], arguments: list[str], settings: dict[str, str], told: str
) -> None:
    (project / "unnamed.yaml").write_text("megatron: {}\n")
    (project / "orphan.yaml").write_text("extends: gone.yaml\n")
    (project / "variable.yaml").write_text("run: ${NOBODY_SETS_IT}/runs\n")
    done = launch(project, {**no_slurm, **settings}, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (project / "runs").exists(), "nothing was started"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CLUSTER_TIME", "banana", "minutes, hours:minutes:seconds, or days-hours:minutes:seconds"),
        ("CLUSTER_TIME", "-5", "minutes, hours:minutes:seconds, or days-hours:minutes:seconds"),
        ("CLUSTER_TIME", "24:00:00:00", "minutes, hours:minutes:seconds, or days-hours:minutes:seconds"),
        ("CLUSTER_NODES", "-3", "a positive number"),
        ("CLUSTER_NODES", "two", "a positive number"),
        ("CLUSTER_GPUS_PER_NODE", "x", "a positive number, or TYPE:NUMBER"),
        ("CLUSTER_GPUS_PER_NODE", "0", "a positive number, or TYPE:NUMBER"),
        ("CLUSTER_CPUS_PER_TASK", "1.5", "a positive number"),
        ("BRANCHES", "all", "of the form 0-3,5"),
    ],
)
def test_a_setting_without_sense_is_refused(
    project: Path, no_slurm: dict[str, str], name: str, value: str, expected: str
) -> None:
    """Printed, submitted or begun by sbatch, of the environment or the file, whichever script it is."""
    told = f"{name} is '{value}'; it must be {expected}\n"
    for script in sorted((project / "slurm").glob("*.sh")):
        if script.name != "common.sh":
            done = launch(project, {**no_slurm, "DRY_RUN": "1", name: value}, script=f"slurm/{script.name}")
            assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{script.name}: {told}")
    (project / "slurm/cluster.env").write_text(f"{name}={value}\n")
    for env in ({}, {"SLURM_JOB_ID": "7"}):
        done = launch(project, {**no_slurm, **env})
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{Path(SCRIPT).name}: {told}")
    assert not (project / "runs").exists(), "nothing was started"


@pytest.mark.parametrize("time", ["90", "90:00", "24:00:00", "1-0", "1-12:30", "7-00:00:00", "UNLIMITED"])
def test_times_that_sbatch_takes(project: Path, no_slurm: dict[str, str], time: str) -> None:
    sbatch, _ = dry_run(project, {**no_slurm, "CLUSTER_TIME": time})
    assert options(sbatch)["time"] == time


@pytest.mark.parametrize(
    ("option", "value", "expected"), [("nodes", "2-4", "a positive number"), ("array", "*", "of the form 0-3,5")]
)
def test_further_options_that_the_script_must_understand(
    project: Path, no_slurm: dict[str, str], option: str, value: str, expected: str
) -> None:
    done = launch(project, {**no_slurm, "DRY_RUN": "1", "CLUSTER_SBATCH_OPTIONS": f"--{option}={value}"})
    told = f"--{option} of CLUSTER_SBATCH_OPTIONS is '{value}'; it must be {expected}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{Path(SCRIPT).name}: {told}")


def test_a_misspelled_key_is_not_submitted(
    project: Path, no_slurm: dict[str, str], stub: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    """Where `cherry` runs; what is of branches is read as one of them."""
    recording_sbatch(tmp_path)
    env = {**no_slurm, **stub(""), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = launch(project, env, "configs/cherry_tiny.yaml", "--set", "megatron.train-iter=3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("unknown key megatron.train-iter; did you mean 'train-iters'?\n")
    assert not (tmp_path / "given").exists() and not (project / "runs").exists()
    (project / "branch.yaml").write_text("extends: configs/branch_227m.yaml\nmegatron: {seed: 1${CHERRY_BRANCH}}\n")
    done = launch(project, env, "branch.yaml", script="slurm/recover_227m.sh")
    assert done.returncode == 0 and (tmp_path / "given").exists(), done.stderr
    (tmp_path / "given").unlink()
    (tmp_path / "broken").write_text("#!/bin/bash\necho no such library >&2\nexit 1\n")
    (tmp_path / "broken").chmod(0o755)
    done = launch(project, {**env, "CHERRY": f"{tmp_path}/broken"})
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "given").exists()


def test_submitted_from_elsewhere(project: Path, no_slurm: dict[str, str], tmp_path: Path) -> None:
    """As sbatch starts it, a copy alone."""
    for script in (project / "slurm").glob("*.sh"):
        if script.name in ("common.sh", "submit_cherry.sh"):
            continue
        copy = tmp_path / "spool" / script.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(script.read_bytes())
        done = launch(tmp_path, {**no_slurm, "SLURM_SUBMIT_DIR": str(tmp_path)}, script=str(copy))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"{script.name}: submit it from the project's folder\n"


def test_a_misspelled_setting_of_the_environment_is_refused(project: Path, no_slurm: dict[str, str]) -> None:
    done = launch(project, {**no_slurm, "DRY_RUN": "1", "CLUSTER_PARTITON": "gpu"})
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "environment: unknown setting CLUSTER_PARTITON (if it is another program's, unset it)" in done.stderr
    done = launch(project, {**no_slurm, "DRY_RUN": "1", "CLUSTER_NAME": "a", "SLURM_JOB_ID": "7"})
    assert done.returncode == 0, "a node's own"


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}
# What a job calls, each noting how; `squeue` does not answer before it is asked a third time.
CALLED = """\
#!/bin/bash
echo "${0##*/} $*" >>'FOLDER/called'
case "${0##*/} $*" in
    "scontrol show hostnames"*) echo n1 ;;
    squeue*) [ "$(grep -c squeue 'FOLDER/called')" = 3 ] && echo RUNNING ;;
    "cherry job end"*) exit 10 ;;
esac
"""


def test_a_controller_that_is_away_as_the_ranks_end(project: Path, tmp_path: Path) -> None:
    """Else the job would pass for one that SLURM has ended, and not go on."""
    (tmp_path / "bin").mkdir()
    for name in ("scontrol", "squeue", "srun", "sleep", "cherry"):
        (tmp_path / "bin" / name).write_text(CALLED.replace("FOLDER", str(tmp_path)))
        (tmp_path / "bin" / name).chmod(0o755)
    (project / "runs/cherry_1p8b/jobs/7-0").mkdir(parents=True)
    done = launch(project, {**JOB, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    (end,) = (line for line in called if line.startswith("cherry job end"))
    assert "--status 0 --state RUNNING " in end and called.count("sleep 30") == 2
    assert called[-1] == "scontrol requeue 7"


def test_settings_are_known_and_documented(project: Path, no_slurm: dict[str, str]) -> None:
    """A misspelled setting is refused; the example names every one, and works as it is."""
    settings = project / "slurm/cluster.env"
    settings.write_text("CLUSTER_NODE=4\n")
    done = launch(project, {**no_slurm, "DRY_RUN": "1"})
    assert done.returncode == 2
    told, _, known = done.stderr.partition("; known are ")
    assert told.endswith("slurm/cluster.env: unknown setting CLUSTER_NODE")
    example = (ROOT / "slurm/cluster.env.example").read_text()
    assert sorted(known.split()) == sorted(re.findall(r"^#(CLUSTER_\w+)=", example, re.MULTILINE))
    for text in (example, example.replace("#CLUSTER_", "CLUSTER_")):
        settings.write_text(text)
        dry_run(project, no_slurm)
