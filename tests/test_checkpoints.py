"""What a run starts from is the model that its configuration describes, or the run is refused at once."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cherry_megatron.checkpoints import where_from
from cherry_megatron.model.pattern import parse
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.surgery import assemble, assemble_layers, compress
from cherry_megatron.surgery.depth import objects
from cherry_megatron.surgery.jobs import Copy
from cherry_megatron.surgery.writing import Spec
from tests.conftest import run_ranks
from tests.test_bad_input import check

LOOPED = "*-[*-*-]x3*-"


def forget(checkpoint: Path, *names: str) -> None:
    """Remove files of a checkpoint, also from what its hashes are of."""
    path = checkpoint / "integrity.json"
    integrity = json.loads(path.read_text())
    for name in names:
        (checkpoint / name).unlink()
        del integrity["files"][name]
    path.write_text(json.dumps(integrity))


@pytest.fixture(scope="module")
def starts(tmp_path_factory, data, write_config, train) -> Path:
    """A folder with a configuration for each checkpoint in it, whose run starts from that."""
    folder = tmp_path_factory.mktemp("starts")
    looped = write_config(folder / "looped-before", recurrence={"pattern": LOOPED, "loop_scales": True})
    # Stages that share the core say so in the checkpoint's arguments.
    train(looped, 2, "--train-iters 3 --pipeline-model-parallel-size 2")
    shutil.copytree(folder / "looped-before/run/checkpoints", folder / "looped-start")
    shutil.copytree(folder / "looped-start", folder / "unrecorded-start")
    forget(folder / "unrecorded-start/iter_0000003", "lineage.json")
    write_config(folder / "looped", megatron={"load": str(folder / "looped-start")})
    write_config(folder / "unrecorded", megatron={"load": str(folder / "unrecorded-start")})

    def made(name: str, plan, load, *arguments, **sections) -> None:
        start = {"load": str(folder / f"{name}-start"), "finetune": True}
        path = write_config(folder / name, **{**sections, "megatron": {**sections.get("megatron", {}), **start}})
        plan(load, path, (), *arguments).run(folder / f"{name}-start", 1)

    start = folder / "looped-start"
    compress.plan_expansion(start, looped, ()).run(folder / "expanded-start", 1)
    dense = {"pattern": "(*-)x8", "loop_scales": False}
    megatron = {"load": str(folder / "expanded-start"), "finetune": True}
    write_config(folder / "expanded", recurrence=dense, megatron=megatron)
    shallow = {"pattern": LOOPED, "loop_scales": False}
    made("compressed", compress.plan_compression, folder / "expanded-start", compress.Options(), recurrence=shallow)
    corrected = {**shallow, "loop_rank": 2}
    made(
        "corrected", compress.plan_compression, folder / "expanded-start", compress.Options(), recurrence=corrected
    )
    mixture = {"experts": 2, "prefix": 8, "router_hidden": 8}
    made("mixture", assemble.plan_assembly, [start] * 2, 0, moee=mixture)
    inside = {"pattern": "*-[*E*E]x3*-"}
    experts = {"num-experts": 2, "moe-router-topk": 2}
    made("experts", assemble_layers.plan_layers, [start] * 2, 0, recurrence=inside, megatron=experts)
    routed = {**inside, "loop_routers": True}
    made("routed", assemble_layers.plan_layers, [start] * 2, 0, recurrence=routed, megatron=experts)
    shutil.copytree(data / "tokenizer", folder / "other-tokenizer")
    tokens = folder / "other-tokenizer/tokenizer.json"
    tokens.write_text(tokens.read_text() + " ")
    return folder


STARTS = ("looped", "unrecorded", "compressed", "corrected", "expanded", "mixture", "experts", "routed")
GROUPS = ("megatron.group-query-attention=true", "megatron.num-query-groups=2")
ANGLES, OTHER_TOKENS = "megatron.rotary-base=500000", "megatron.tokenizer-model=FOLDER/other-tokenizer"
DENSE_LOOPED = "recurrence.pattern='*-[(*-)x6]x2*-'"
HEADS = ("megatron.num-attention-heads=2", "megatron.kv-channels=16")  # of tensors of the same shapes
# name: (what it starts from, overrides, flags, what is said)
CASES = {
    **{f"{name}-fits": (name, (), (), "") for name in STARTS},
    # Trained: loops may be fewer; nothing else of the walk may differ, and nothing that no tensor shows.
    "fewer-loops": ("looped", ("recurrence.loops=1",), (), ""),
    "order": ("looped", ("recurrence.order=sequence",), (), "order is sequence, but PATH was trained with cycle"),
    "injection": ("looped", ("recurrence.injection=add",), (), "injection is add, but PATH was trained with none"),
    "core": ("looped", ("recurrence.pattern='[*-*-*-]x3*-'",), (), "loop_scales is True, but PATH has a layer"),
    "depth": ("looped", ("recurrence.pattern='*-[*-]x3*-'",), (), "PATH holds 4 layers, recurrence.pattern 3"),
    "count": ("looped", ("recurrence.pattern='*-[*-*-]x4*-'",), (), "has vectors of 3 loops, recurrence.pattern"),
    "no-scales": ("looped", ("recurrence.loop_scales=false",), (), "loop_scales is False, but PATH holds"),
    "rank": ("looped", ("recurrence.loop_rank=2",), (), "loop_rank is 2, but PATH has a layer"),
    "heads": ("looped", HEADS, (), "num-attention-heads is 2, but PATH was trained with 4; set it so"),
    "groups": ("looped", GROUPS, (), "2 query groups"),
    "angles": ("looped", ("megatron.rotary-base=500000",), (), "base is 500000, but PATH was trained with 10000"),
    "angles-of-a-flag": ("looped", (), ("--rotary-base", "500000"), "rotary-base is 500000, but"),
    "epsilon": ("looped", ("megatron.norm-epsilon=1e-6",), (), "is 1e-06, but PATH was trained with 1e-05"),
    "gate": ("looped", ("megatron.swiglu=false",), (), "megatron.swiglu is False, but"),
    "head": ("looped", ("megatron.untie-embeddings-and-output-weights=false",), (), "output-weights is False, but"),
    "width": ("looped", ("megatron.ffn-hidden-size=96",), (), "ffn-hidden-size is 96, but PATH has 64"),
    "heads-without-record": ("unrecorded", HEADS, (), "num-attention-heads is 2, but"),
    "tokenizer": ("looped", (OTHER_TOKENS,), (), "or a copy of it, or name megatron.tokenizer-model in `changed`"),
    # Changed on purpose.
    "changed-angles": ("looped", (ANGLES, "changed=[megatron.rotary-base]"), (), ""),
    "changed-tokenizer": ("looped", (OTHER_TOKENS, "changed=[megatron.tokenizer-model]"), (), ""),
    "changed-walk": (
        "looped",
        ("recurrence.order=sequence", "megatron.window-size='8,0'",
         "changed=[recurrence.order, megatron.window-size]"),
        (),
        "",
    ),
    "changed-of-a-mixture": ("mixture", (ANGLES, "changed=[megatron.rotary-base]"), (), ""),
    "changed-of-experts": ("experts", (ANGLES, "changed=[megatron.rotary-base]"), (), ""),
    "changed-of-a-compression": ("compressed", (ANGLES, "changed=[megatron.rotary-base]"), (), ""),
    "changed-other": (
        "looped", (ANGLES, "changed=[recurrence.order]"), (), "or name megatron.rotary-base in `changed` to go on",
    ),
    "changed-nothing": (
        "looped", ("changed=[recurrence.order]",), (), "names recurrence.order, of which PATH is not known",
    ),
    "changed-free": ("compressed", ("changed=[recurrence.order]",), (), "recurrence.order, of which PATH is not"),
    # What changes from run to run.
    "run": (
        "looped",
        ("megatron.attention-dropout=0.1", "megatron.hidden-dropout=0.1", "megatron.bf16=true", "megatron.seed=7",
         "megatron.tensor-model-parallel-size=2", "megatron.sequence-parallel=true", "megatron.seq-length=64",
         "megatron.max-position-embeddings=64", "megatron.attention-backend=unfused",
         "megatron.no-rope-fusion=true", "megatron.lr=0.1", "recurrence.random_loops=[1,3]",
         "megatron.init-method-std=0.5"),
        (),
        "",
    ),
    # Compressed and not trained yet: it was never walked.
    "compressed-order": ("compressed", ("recurrence.order=sequence",), (), ""),
    "compressed-loops": ("compressed", ("recurrence.loops=1",), (), ""),
    "compressed-count": ("compressed", ("recurrence.pattern='*-[*-*-]x5*-'",), (), ""),
    "compressed-injection": ("compressed", ("recurrence.injection=add",), (), ""),
    "compressed-core": ("compressed", ("recurrence.pattern='*-*-[*-]x3*-'",), (), "recurrence.pattern is"),
    "compressed-scales": ("compressed", ("recurrence.loop_scales=true",), (), "loop_scales is True, but"),
    "compressed-heads": ("compressed", HEADS, (), "num-attention-heads is 2, but"),
    "compressed-angles": ("compressed", ("megatron.rotary-base=500000",), (), "rotary-base is 500000, but"),
    # Corrections are of the loops of an order.
    "corrected-order": ("corrected", ("recurrence.order=sequence",), (), "sequence, but PATH was made for cycle"),
    "corrected-injection": ("corrected", ("recurrence.injection=add",), (), "is add, but PATH was made for none"),
    "corrected-rank": ("corrected", ("recurrence.loop_rank=0",), (), "loop_rank is 0"),
    "expanded-loops": ("expanded", (DENSE_LOOPED,), (), "or make a model of other loops of it by `cherry comp"),
    "expanded-order": ("expanded", ("recurrence.order=sequence",), (), ""),
    "expanded-injection": ("expanded", ("recurrence.injection=add",), (), ""),
    "expanded-in-parts": ("expanded", ("recurrence.pattern='(*-)x2[(*-)x6]x1'",), (), ""),
    "expanded-depth": ("expanded", ("recurrence.pattern='(*-)x4'",), (), "holds 8 layers, recurrence.pattern 4"),
    **{
        f"{name}-{what}": (name, (override,), (), says)
        for name in ("mixture", "experts")
        for what, override, says in (
            ("angles", "megatron.rotary-base=500000", "rotary-base is 500000, but"),
            ("order", "recurrence.order=sequence", "recurrence.order is sequence, but"),
        )
    },
    "mixture-heads": ("mixture", HEADS, (), "num-attention-heads is 2, but"),
    # Copies of models have no gates yet.
    "experts-gates": ("experts", ("megatron.moe-router-pre-softmax=true",), (), ""),
    "experts-chosen": ("experts", ("megatron.moe-router-topk=1", "megatron.moe-router-pre-softmax=true"), (), ""),
    "experts-heads": ("experts", HEADS, (), "num-attention-heads is 2, but"),
    "experts-groups": ("experts", GROUPS, (), "2 query groups"),
    "experts-gate": ("experts", ("megatron.swiglu=false",), (), "megatron.swiglu is False, but"),
    "experts-width": ("experts", ("megatron.moe-ffn-hidden-size=32",), (), "size is 32, but PATH has 64"),
    "experts-scales": ("experts", ("recurrence.loop_scales=false",), (), "loop_scales is False, but PATH holds"),
    "experts-head": (
        "experts", ("megatron.untie-embeddings-and-output-weights=false",), (), "weights is False, but PATH",
    ),
    "experts-kinds": ("experts", ("recurrence.pattern='*-[*E*-]x3*-'",), (), "is '*E', but recurrence.pattern"),
    "experts-core": ("experts", ("recurrence.pattern='*-*E[*E]x3*-'",), (), "loop_scales is True, but PATH"),
    "experts-count": ("experts", ("recurrence.pattern='*-[*E*E]x4*-'",), (), "has vectors of 3 loops, recurrence"),
    "experts-depth": ("experts", ("recurrence.pattern='*-[*E*E*E]x3*-'",), (), "holds 4 layers, recur"),
    "experts-routers": ("experts", ("recurrence.loop_routers=true",), (), "is [2, 32], not [3, 2, 32]"),
    "routed-router": ("routed", ("recurrence.loop_routers=false",), (), "is [3, 2, 32], not [2, 32]"),
    "experts-other": ("experts", ("megatron.num-experts=4",), (), "has 2 experts in each layer 'E', and"),
    "experts-none": ("experts", ("recurrence.pattern='*-[*-*-]x3*-'", "megatron.num-experts=null"), (), "has 2"),
}  # fmt: skip


def _said(folder: Path, cases: dict) -> dict[str, list[str]]:
    """Why the start of each case is refused."""
    from cherry_megatron.checkpoints import unloadable
    from cherry_megatron.config import load
    from cherry_megatron.errors import CherryError
    from cherry_megatron.platform.machine import prepare

    prepare()
    found = {}
    for name, (start, overrides, flags, _) in cases.items():
        try:
            overrides = [override.replace("FOLDER", str(folder)) for override in overrides]
            config = load(folder / start / "config.yaml", overrides, flags)
            found[name] = unloadable(config)
        except CherryError as error:
            found[name] = [str(error)]
    return found


@pytest.fixture(scope="module")
def said(starts, tmp_path_factory) -> dict[str, list[str]]:
    (found,) = run_ranks(tmp_path_factory.mktemp("said"), 1, _said, starts, CASES)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_start_is_the_model_of_the_configuration(name, said, starts):
    start, _, _, says = CASES[name]
    if not says:
        assert said[name] == []
        return
    (sentence,) = said[name]
    folder = next((starts / f"{start}-start").glob("iter_*"))
    assert says.replace("PATH", str(folder)) in sentence and str(folder) in sentence


def test_it_is_one_sentence_and_nothing_is_written(starts):
    path = starts / "compressed/config.yaml"
    command = ["pretrain", "--config", str(path), "--set", "megatron.rotary-base=500000"]
    check(starts / "compressed", command, f"cherry pretrain: {path}: megatron.rotary-base is 500000, but")


@pytest.mark.parametrize("name", ["unrecorded", "routed"])
def test_what_fits_is_trained_and_fits_again(name, starts, tmp_path, train):
    path, run = starts / name / "config.yaml", tmp_path / "run"
    overrides = (f"run={run}", "megatron.finetune=true", "megatron.train-iters=1", "megatron.lr-warmup-iters=0")
    (step,) = train(path, 1, "", overrides)
    assert step["loss"] < 7  # the loss of a guess is the logarithm of 512: 6.2
    again = (f"run={tmp_path / 'again'}", f"megatron.load={run}")
    (found,) = run_ranks(tmp_path / "said", 1, _said, starts, {"it": (name, again, (), "")})
    assert found["it"] == []


def test_what_is_changed_is_said_and_recorded(starts, tmp_path, train):
    """And it is the run's own from then on: another one is refused, named or not."""
    path = starts / "looped/config.yaml"
    run = tmp_path / "run"
    overrides = (f"run={run}", ANGLES, "changed=[megatron.rotary-base]", "megatron.finetune=true")
    train(path, 1, "--train-iters 1 --lr-warmup-iters 0", overrides)
    said = (starts / "looped/output/rank0.out").read_text()
    start = starts / "looped-start/iter_0000003"
    assert f"starts from {start} (weights only), with megatron.rotary-base 500000 for 10000\n" in said
    record = json.loads((run / "checkpoints/iter_0000001/lineage.json").read_text())
    assert record["config"]["changed"] == ["megatron.rotary-base"]
    assert record["config"]["megatron"]["rotary-base"] == 500000
    command = ["pretrain", "--config", str(path), "--set", f"run={run}"]
    for override in overrides[2:]:
        command += ["--set", override]
    check(tmp_path, command, "was trained with megatron.rotary-base 500000, not 10000; choose another run")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("[megatron.lr]", "`changed` cannot name megatron.lr"),
        ("[recurrence.pattern]", "`changed` cannot name recurrence.pattern"),
        ("[rotary-base]", "did you mean 'megatron.rotary-base'?"),
        ("megatron.rotary-base", "`changed` must be a list of keys"),
        ("[5]", "`changed` must be a list of keys"),
        ("[recurrence.order, recurrence.order]", "names recurrence.order twice"),
    ],
)
def test_what_cannot_be_changed_is_refused(changed, says, starts):
    from cherry_megatron.config import load
    from cherry_megatron.errors import CherryError

    with pytest.raises(CherryError, match=re.escape(says)):
        load(starts / "looped/config.yaml", [f"changed={changed}"])


def test_without_a_start_there_is_nothing_to_change(tmp_path, write_config):
    from cherry_megatron.config import load
    from cherry_megatron.errors import CherryError

    with pytest.raises(CherryError, match=r"`changed` is of what megatron\.load names; set that"):
        load(write_config(tmp_path), ["changed=[recurrence.order]"])


def as_a_gpt(name: str) -> str:
    """A tensor's name in Megatron's GPTModel, which numbers layers, each of two sublayers."""
    _, _, number, rest = name.split(".", 3) if name.startswith("decoder.layers.") else ("", "", "", name)
    for ours, theirs in {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "decoder.final_norm.": "decoder.final_layernorm.",
    }.items():
        rest = rest.replace(ours, theirs)
    return f"decoder.layers.{int(number) // 2}.{rest}" if number else rest


@pytest.mark.parametrize("gpt", [False, True], ids=["hybrid", "gpt"])
def test_a_checkpoint_of_plain_megatron_is_named_and_can_be_made_one_of_ours(gpt, starts, tmp_path, train):
    source = open_checkpoint(starts / "expanded-start")
    made = objects(source, parse("(*-)x8"), False)
    if gpt:
        made["common_state/shard_0_1"][0]["args"].state |= {"hybrid_layer_pattern": None, "num_layers": 8}
    names = {name: as_a_gpt(name) if gpt else name for name in source.model}
    jobs = [Copy((n,), (Spec(new, source.model[n].dtype, source.model[n].shape),)) for n, new in names.items()]
    folder = compress.Surgery({"": source}, jobs, made, "none", {}, []).run(tmp_path / "plain", 1)
    for name in ("lineage.json", "manifest.json"):
        forget(folder, name)
    if not gpt:  # which Megatron writes if it is asked to
        (folder / "integrity.json").unlink()
    path = starts / "expanded/config.yaml"
    load = f"megatron.load={tmp_path / 'plain'}"
    (found,) = run_ranks(tmp_path / "said", 1, _said, starts, {"it": ("expanded", (load,), (), "")})
    why = "names of Megatron's GPTModel" if gpt else "it has no integrity.json"
    assert len(found["it"]) == 1 and why in found["it"][0] and "by `cherry compress-depth`" in found["it"][0]
    compress.plan_compression(tmp_path / "plain", path, (), compress.Options()).run(tmp_path / "ours", 1)
    ours = open_checkpoint(tmp_path / "ours")
    assert {n: ours.read(n).tobytes() for n in ours.model} == {n: source.read(n).tobytes() for n in source.model}
    once = ("megatron.train-iters=1", "megatron.lr-warmup-iters=0", f"run={tmp_path / 'run'}")
    assert len(train(path, 1, "", (f"megatron.load={tmp_path / 'ours'}", *once))) == 1


def test_a_new_run_is_not_told_that_it_lost_its_steps(tmp_path):
    config = SimpleNamespace(run=tmp_path, recurrence=SimpleNamespace(further_loops=""))
    (tmp_path / "steps.jsonl").touch()  # by the training that asks
    assert where_from(config, SimpleNamespace(load=None)) == "starts from new weights"
    (tmp_path / "steps.jsonl").write_text('{"iteration": 1}\n')
    assert "the steps before left no checkpoint" in where_from(config, SimpleNamespace(load=None))
