"""An experiment's file: what it may say, and what its tasks are."""

from pathlib import Path

import pytest
import yaml

from cherry_megatron.cli import check_arguments
from cherry_megatron.config import Config, load, outline
from cherry_megatron.errors import CherryError
from cherry_megatron.experiments.plan import Experiment, Stage, Task, find, read
from cherry_megatron.experiments.run import check
from cherry_megatron.monitor.accounting import account, together

BASE = {"run": "runs/x", "recurrence": {"pattern": "*-"}, "megatron": {"lr": 1e-3}}
STAGES = {
    "parent": {"verb": "pretrain", "set": {"recurrence.pattern": "*-[(*-)x4]x8*-", "megatron.min-lr": 1e-5}},
    "averaged": {"verb": "compress-depth", "args": {"load": "{parent}", "groups": "0-3,4-7", "expand": False}},
    "recovered": {
        "verb": "pretrain",
        "seeds": [2],
        "set": {"megatron.load": "{averaged}", "megatron.finetune": True},
    },
    "measured": {
        "verb": "evaluate",
        "args": {"loops": [1, 2]},
        "set": {"megatron.load": "{recovered}"},
        "seeds": [2],
    },
}


def write(folder: Path, base: dict | None = None, **keys: object) -> Path:
    content = {"about": "why", "config": "base.yaml", "seeds": [1, 2], "stages": STAGES, **keys}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(base or BASE))
    (folder / "it.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "it.yaml"


def with_stage(folder: Path, name: str, **keys: object) -> Path:
    return write(folder, stages={**STAGES, name: {**STAGES.get(name, {}), **keys}})


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return read(write(tmp_path))


def test_stages_come_in_the_files_order_and_seeds_within(experiment):
    assert [task.name for task in experiment.tasks()] == [
        "parent/seed-1", "parent/seed-2", "averaged/seed-1", "averaged/seed-2",
        "recovered/seed-2", "measured/seed-2",
    ]  # fmt: skip
    needs = {task.name: task.needs for task in experiment.tasks()}
    assert needs["parent/seed-1"] == [] and needs["recovered/seed-2"] == ["averaged/seed-2"]
    names = {task.stage.name for task in experiment.tasks(["recovered"])}
    assert names == {"parent", "averaged", "recovered"}


def test_every_verb_is_given_its_output(experiment, tmp_path):
    first, _, averaged, _, recovered, measured = experiment.tasks()
    base = ["--config", str(tmp_path / "base.yaml")]
    assert first.arguments(Path("o")) == [
        *base, "--set", "megatron.min-lr=1.0e-05", "--set", "megatron.seed=1",
        "--set", "recurrence.pattern='*-[(*-)x4]x8*-'", "--set", "run=o/parent/seed-1",
        "--set", "evaluation.at_start=true",
    ]  # fmt: skip
    assert averaged.arguments(Path("o")) == [
        *base, "--groups=0-3,4-7", "--load=o/parent/seed-1", "--save=o/averaged/seed-1",
    ]  # fmt: skip
    assert "megatron.load=o/averaged/seed-2" in recovered.arguments(Path("o"))
    assert measured.arguments(Path("o"))[2:5] == ["--loops", "1", "2"]
    assert "evaluation.at_start=true" not in measured.arguments(Path("o"))
    for task in experiment.tasks():
        check_arguments(task.stage.verb, task.arguments(Path("o")))


def test_what_set_says_is_read_again(experiment):
    read = outline(experiment.stages["parent"].config, experiment.tasks()[0].overrides(Path("o")))
    assert read.recurrence.pattern == "*-[(*-)x4]x8*-"
    assert read.megatron["min-lr"] == 1e-5 and read.megatron["seed"] == 1


def test_a_base_lies_beside_the_file(tmp_path):
    write(tmp_path)
    path = write(tmp_path / "experiments", config="../base.yaml")
    assert read(path).stages["parent"].config == tmp_path / "base.yaml"
    own = with_stage(tmp_path, "parent", config="other.yaml")
    assert read(own).stages["parent"].config == tmp_path / "other.yaml"


def test_a_definition_is_that_of_what_decides_the_result(tmp_path):
    first = read(write(tmp_path / "one")).definitions()
    assert read(write(tmp_path / "two")).definitions() == first
    assert read(write(tmp_path / "run", base={**BASE, "run": "elsewhere"})).definitions() == first
    assert len(set(first.values())) == len(first)
    changed = with_stage(tmp_path / "three", "averaged", args={"load": "{parent}", "groups": "slots"})
    differ = {name for name, value in read(changed).definitions().items() if value != first[name]}
    assert differ == {"averaged/seed-1", "averaged/seed-2", "recovered/seed-2", "measured/seed-2"}
    other = write(tmp_path / "four", base={**BASE, "megatron": {"lr": 1e-4}})
    assert not set(read(other).definitions().values()) & set(first.values())
    assert read(with_stage(tmp_path / "five", "parent", label="another")).definitions() == first


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"abuot": "x"}, "unknown key abuot; did you mean 'about'"),
        ({"about": None}, "`about` must be a text"),
        ({"config": 3}, "`config` must be a text"),
        ({"seeds": []}, "`seeds` must be a list of different positive numbers"),
        ({"seeds": [1, 1]}, "`seeds` must be a list of different"),
        ({"seeds": [0]}, "`seeds` must be a list of different positive"),
        ({"seeds": 3}, "`seeds` must be a list"),
        ({"stages": {}}, "`stages` must hold stages"),
        ({"stages": {"a/b": {"verb": "pretrain"}}}, "the stage 'a/b' is a folder's name too"),
        ({"stages": {"a": None}}, "stages.a must hold keys and values"),
        (
            {"stages": {"a": {"verb": "pretrain", "set": {"megatron.load": "{b}"}},
                        "b": {"verb": "pretrain", "set": {"megatron.load": "{a}"}}}},
            "the stages a <- b <- a need each other",
        ),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_sentence(tmp_path, keys, says):
    with pytest.raises(CherryError) as error:
        read(write(tmp_path, **keys))
    assert says in str(error.value) and str(tmp_path / "it.yaml") in str(error.value)


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("parent", {"vreb": "x"}, "unknown key stages.parent.vreb; did you mean 'verb'"),
        ("parent", {"verb": "pretain"}, "'pretain' is none of an experiment; did you mean 'pretrain'"),
        ("parent", {"verb": None}, "`stages.parent.verb` must be a text"),
        ("parent", {"seeds": [3]}, "stages.parent.seeds has 3, which `seeds` has not"),
        ("parent", {"seeds": [1]}, "stages.averaged needs {parent} with seed 2, which it lacks"),
        ("parent", {"set": {"megatron.load": "{parnet}"}}, "{parnet}, which is no stage; did you mean 'parent'"),
        ("parent", {"set": {"megatron.load": "{parent}"}}, "the stages parent <- parent need each other"),
        ("parent", {"set": {"run": "x"}}, "stages.parent.set.run is given by the experiment"),
        ("parent", {"set": {"megatron.seed": 2}}, "stages.parent.set.megatron.seed is given by the experiment"),
        ("parent", {"set": {"evaluation.at_start": False}}, "set.evaluation.at_start is given by the experiment"),
        ("parent", {"set": [1]}, "stages.parent.set must hold keys and values"),
        ("averaged", {"args": {"dry-run": True}}, "stages.averaged.args.dry-run is not for an experiment"),
        ("parent", {"set": {"flags": ["--seed", "7"]}}, "stages.parent.set.flags is given by the experiment"),
        ("averaged", {"args": {"save": "x"}}, "stages.averaged.args.save is not for an experiment"),
        ("averaged", {"args": {"gruops": "slots"}}, "compress-depth has no flag --gruops; did you mean 'groups'"),
    ],
)  # fmt: skip
def test_a_bad_stage_is_one_sentence(tmp_path, name, keys, says):
    with pytest.raises(CherryError) as error:
        read(with_stage(tmp_path, name, **keys))
    assert says in str(error.value) and str(tmp_path / "it.yaml") in str(error.value)


def test_an_unknown_stage_or_experiment_is_named(tmp_path, experiment, monkeypatch):
    with pytest.raises(CherryError, match="there is no stage 'parrent'; did you mean 'parent'"):
        experiment.tasks(["parrent"])
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "configs/experiments").rename(tmp_path / "configs/experiments/depth.yaml")
    assert find("depth") == Path("configs/experiments/depth.yaml") and find("x/y.yaml") == Path("x/y.yaml")
    with pytest.raises(CherryError, match=r"no experiment configs/experiments/dept\.yaml; did you mean 'depth'"):
        find("dept")


def test_every_selective_stage_of_ours_has_its_full_one():
    experiment = read(Path(__file__).parents[2] / "configs/experiments/sgt.yaml")

    def shared(stage: Stage) -> str:
        kept = {key: value for key, value in stage.set.items() if not key.startswith("sgt.")}
        return f"{stage.config} {sorted(kept.items())}"

    stages = experiment.stages.values()
    full = {(shared(stage), seed) for stage in stages for seed in stage.seeds if "sgt.alpha" not in stage.set}
    selective = {(shared(stage), seed) for stage in stages for seed in stage.seeds if stage.set.get("sgt.alpha")}
    assert selective and selective <= full
    assert full - selective == {(shared(experiment.stages["reference"]), 1)}


OURS = Path(__file__).parents[2] / "configs/experiments"


@pytest.fixture
def mixtures(monkeypatch) -> Experiment:
    """Our experiment of mixtures, with the paths of its defaults."""
    monkeypatch.delenv("CHERRY_SHARDS", raising=False)
    monkeypatch.chdir(OURS.parents[1])
    return read(OURS / "moee.yaml")


def test_our_mixtures_can_be_trained_as_declared(mixtures):
    check(mixtures, Path("o"))  # arguments, CUDA graphs, sections and sizes of every stage


def test_our_mixtures_start_from_as_many_experts_as_they_have(mixtures):
    stages = mixtures.stages
    for stage in (stage for stage in stages.values() if stage.verb == "assemble-moee"):
        of_it = [other for other in stages.values() if other.set.get("megatron.load") == f"{{{stage.name}}}"]
        assert of_it, f"{stage.name} is assembled for nothing"
        assert len(set(stage.args["load"])) == len(stage.args["load"])
        for trained in (load_of(mixtures, other.name) for other in of_it):
            models = trained.moee.experts if trained.moee else trained.value("num-experts")
            assert models == len(stage.args["load"])
            assert trained.mtp.depths == stage.set.get("mtp.depths", 0)
            read = outline(stage.config, Task(stage, 1).overrides(Path("o")))
            assert read.recurrence == trained.recurrence and read.moee == trained.moee
            assert read.megatron.get("num-experts") == trained.value("num-experts")


def test_our_mixtures_are_compared_on_one_text(mixtures):
    trained = {name: load_of(mixtures, name) for name, stage in mixtures.stages.items() if stage.verb == "pretrain"}
    assert {config.prefix for config in trained.values()} == {64}
    for key in ("valid-data-path", "seq-length", "padded-vocab-size"):
        assert len({str(config.value(key)) for config in trained.values()}) == 1
    assert len({config.evaluation for config in trained.values()}) == 1
    # No expert has read what is held out, nor another's shard of the same number of experts.
    read_by = {
        name: {Path(path).name for path in config.value("train-data-path")} for name, config in trained.items()
    }
    four = ("ko-docs", "ko-reviews", "en-1", "en-2")
    assert set().union(*(read_by[name] for name in four)) == read_by["ko"] | read_by["en"]
    assert sum(len(read_by[name]) for name in four) == len(read_by["ko"]) + len(read_by["en"]) == 4
    assert not any("held_out" in names for names in read_by.values())


def test_the_dense_models_beside_our_mixtures_have_their_active_size_and_tokens(mixtures):
    def active(name: str) -> int:
        config = load_of(mixtures, name)
        rows = account(config.recurrence, config.shape, config.value("seq-length"), config.moee, config.mtp.depths)
        return together(rows).active

    def steps(name: str) -> int:
        return load_of(mixtures, name).value("train-iters")

    for dense, mixture in (("dense-25", "models-2"), ("dense-9", "layers-4")):
        layer = (active("dense-25") - active("dense-9")) / 16
        assert abs(active(dense) - active(mixture)) <= layer / 2 + 1, f"{dense} is not the nearest to {mixture}"
        experts = mixtures.stages[mixture].set["megatron.load"].strip("{}")
        branches = [name.strip("{}") for name in mixtures.stages[experts].args["load"]]
        assert steps(dense) == sum(map(steps, ("dense-48", "recovered", *branches, mixture)))
        for branch in branches:
            (more,) = [n for n, s in mixtures.stages.items() if s.set == {"megatron.load": f"{{{branch}}}"}]
            seeds = {1, 2, 3} if mixture == "models-2" else {1}  # of four branches the others are left out for time
            assert steps(more) == steps(mixture) and set(mixtures.stages[more].seeds) == seeds
    assert steps("unbranched") == steps("ko") + steps("models-2")


def load_of(experiment: Experiment, name: str) -> Config:
    stage = experiment.stage(name)
    return load(stage.config, Task(stage, stage.seeds[0]).overrides(Path("o")))


def test_our_larger_point_can_be_trained_as_declared(monkeypatch):
    for name in ("CHERRY_SHARDS", "CHERRY_PAIRS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(OURS.parents[1])
    larger = read(OURS / "larger.yaml")
    check(larger, Path("o"))
    small = {name: load_of(read(OURS / "depth.yaml"), name) for name in ("dense-48", "average-distilled")}
    for name, config in small.items():
        wide = load_of(larger, name)
        assert wide.recurrence == config.recurrence and wide.shape.hidden == 2 * config.shape.hidden
    assert load_of(larger, "dense-24-flops").value("train-iters") == 2 * load_of(larger, "dense-48").value(
        "train-iters"
    )
