"""The claims table against made-up records: which training decides, the value counted by hand, the verdict."""

import json
from pathlib import Path
from typing import Any

import pytest

from cherry_megatron.monitor.document import markdown
from cherry_megatron.report.claims import CLAIMS, NOT_REPRODUCED, NOT_RUN, REPRODUCED, claims, decide
from cherry_megatron.report.sources import Source, read_sources
from tests.experiments.test_report import evaluated, trained

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def claim(words: str):
    (found,) = [each for each in CLAIMS if words in each.says]
    return found


RECOVER, DEPTH = claim("recover the loss of a dense model"), claim("48 layers")
SEMANTIC, EFFICIENCY = claim("15% of the output tokens"), claim("4.5 times")
MEANING, COS, RATIO = claim("random marks"), claim("cos in the mean"), claim("by the ratio")
SHUFFLED, ENDED = claim("shuffled"), claim("free generation")
MIXTURE, ACTIVE, SPEED = claim("mixture of two"), claim("512M"), claim("multi-token")


def line(stage: str, seed: int, losses: list[float], keys: str = "", **more: Any) -> dict[str, Any]:
    """A training whose losses are those after 0, 10, ... steps with its 2 loops; `keys` are of its command."""
    found = trained(stage, seed, [evaluated(10 * place, loss) for place, loss in enumerate(losses)])
    sets = "".join(f" --set {key}" for key in keys.split())
    return {**found, "base": f"base-{seed}", "command": f"cherry pretrain --config c.yaml{sets}", **more}


def compressed(stage: str, seed: int, method: str = "average") -> dict[str, Any]:
    made = {"options": {"method": method, "groups": "adjacent", "align": "none"}}
    command = f"cherry compress-depth --load=dense/seed-{seed} --save={stage}/seed-{seed}"
    return {**trained(stage, seed, []), **made, "verb": "compress-depth", "command": command}


def source(folder: Path, *lines: dict[str, Any]) -> list[Source]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return read_sources([folder / "records.jsonl"])


DENSE = {"loops": 1, "parameters": 3_750_000}  # 2.5 times as many


def dense(stage: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    return line(stage, seed, []) | {"evaluations": [{"iteration": 9, "losses": {"1": loss}}], **DENSE, **more}


def recovery(seed: int, loss: float, stage: str = "average", start: str = "start") -> dict[str, Any]:
    return line(stage, seed, [9.0, loss], f"megatron.load={start}/seed-{seed}")


@pytest.mark.parametrize(("loss", "verdict"), [(2.01, REPRODUCED), (2.05, NOT_REPRODUCED)])
def test_a_recovered_model_is_held_against_a_dense_one(tmp_path, loss, verdict):
    lines = [dense("half", seed, 1.0 * seed) for seed in (1, 2)]
    lines += [compressed("start", seed) for seed in (1, 2)] + [recovery(1, loss / 2), recovery(2, loss)]
    found = decide(RECOVER, source(tmp_path, *lines))
    assert found[0] == verdict and found[1] == pytest.approx([loss / 2 - 1] * 2)
    assert (found[2].row.name, found[3].row.name) == ("average", "half")


def test_seeds_are_paired_in_whatever_order_they_ended(tmp_path):
    lines = [dense("half", seed, 1.0 * seed) for seed in (1, 2, 3)]
    lines += [compressed("start", seed) for seed in (1, 2, 3)] + [recovery(seed, 1.02 * seed) for seed in (3, 1, 2)]
    assert decide(RECOVER, source(tmp_path, *lines))[1] == pytest.approx([0.02] * 3)


def test_only_what_was_made_as_the_claim_asks_decides(tmp_path):
    half, start = dense("half", 1, 2.0), compressed("start", 1)
    found = decide(RECOVER, source(tmp_path / "a", half, start, recovery(1, 2.0, "new", "nowhere")))
    assert found[0] == NOT_RUN, "its weights are from elsewhere"
    found = decide(RECOVER, source(tmp_path / "b", half, compressed("start", 1, "random"), recovery(1, 2.0)))
    assert found[0] == NOT_RUN, "random layers"
    for name, parameters in (("c", 1_500_000), ("d", 7_500_000)):
        found = decide(
            RECOVER, source(tmp_path / name, {**half, "parameters": parameters}, start, recovery(1, 2.0))
        )
        assert found[0] == NOT_RUN, "no dense model of its kind"
    parent = dense("dense", 1, 2.0)
    assert decide(RECOVER, source(tmp_path / "e", parent, start, recovery(1, 2.0)))[0] == NOT_RUN, "its own parent"
    assert decide(RECOVER, source(tmp_path / "f", half, start, recovery(1, 2.0)))[0] == REPRODUCED


def test_most_seeds_decide_and_then_the_lowest_loss(tmp_path):
    lines = [dense("half", 1, 2.0), compressed("start", 1), compressed("start", 2)]
    lines += [recovery(1, 1.0, "lucky"), *(recovery(s, 3.0, "worse") for s in (1, 2))]
    lines += [recovery(s, 2.5, "better") for s in (1, 2)]
    _, values, chosen, _ = decide(RECOVER, source(tmp_path, *lines))
    assert chosen.row.name == "better" and values == pytest.approx([0.25, 0.25])


def selective(stage: str, seed: int, loss: float, keys: str = "", cos: float = 0.5, **sgt: Any) -> dict[str, Any]:
    options = {"marks": "semantic", "top_loss": None, "alpha": 0.7, "alpha_start": None, "alpha_steps": 0, **sgt}
    probe = {"iteration": 5, "coupling": {"all": {"cos": cos, "ratio": 2 * cos}}}
    return line(stage, seed, [9.0, loss], keys, sgt=options, rho=0.125, probes=[probe])


def test_selective_claims_are_counted_by_hand(tmp_path):
    full = line("full", 1, [9.0, 5.0])
    lines = [full, selective("semantic", 1, 6.0), selective("random", 1, 5.5, marks="random")]
    other = {"base": "shuffled"}
    lines += [line("full-s", 1, [9.0, 5.0]) | other]
    lines += [selective("semantic-s", 1, 8.0, "data.shuffle=tokens") | other]
    found = source(tmp_path, *lines)
    # Gains of 3, 3.5 and 1 of 4; an eighth of the tokens.
    assert decide(SEMANTIC, found)[:2] == (REPRODUCED, [0.75])
    assert decide(EFFICIENCY, found)[:2] == (REPRODUCED, [6.0])
    assert decide(MEANING, found)[:2] == (NOT_REPRODUCED, [-0.125])
    assert decide(COS, found)[:2] == (NOT_REPRODUCED, [0.5]) and decide(RATIO, found)[:2] == (REPRODUCED, [1.0])
    assert decide(SHUFFLED, found)[:2] == (REPRODUCED, [-0.5])
    assert decide(ENDED, found)[0] == NOT_RUN
    unpaired = source(tmp_path / "unpaired", {**full, "base": "another"}, lines[1])
    assert {decide(each, unpaired)[0] for each in (SEMANTIC, EFFICIENCY, COS, RATIO, MEANING)} == {NOT_RUN}


def test_a_mixture_is_held_against_the_best_single_model(tmp_path):
    made = {**compressed("mixed", 1), "verb": "assemble-moee"}
    both = line("two", 1, [3.0, 1.9], "megatron.load=mixed/seed-1", active_parameters=500_000_000)
    both["evaluations"][-1] |= {"iteration": 20, "moee": {"2": {"loss/0": 2.1, "loss/1": 2.2}}}
    singles = [line("left", 1, [3.0, 2.0]), line("right", 1, [3.0, 2.5])]
    found = decide(MIXTURE, source(tmp_path, made, both, *singles))
    assert found[0] == REPRODUCED and found[1] == pytest.approx([-0.05]) and found[3].row.name == "left"
    layers = line("layers", 1, [3.0, 1.91], "megatron.num-experts=4")  # no single model either
    assert decide(MIXTURE, source(tmp_path, made, both, *singles, layers))[0] == REPRODUCED
    singles[1]["evaluations"][-1]["losses"]["2"] = 1.91
    assert decide(MIXTURE, source(tmp_path, made, both, *singles))[0] == NOT_REPRODUCED
    # Nor is it held against its own experts, which were trained for less.
    of_both = {**made, "command": "cherry assemble-moee --load left/seed-1 right/seed-1 --save mixed/seed-1"}
    assert decide(MIXTURE, source(tmp_path, of_both, both, *singles))[0] == NOT_RUN
    # Of a mixture of another size the active parameters say nothing.
    assert decide(ACTIVE, source(tmp_path, made, both))[0] == NOT_RUN
    assert decide(ACTIVE, source(tmp_path, made, {**both, "parameters": 510_000_000}))[0] == REPRODUCED
    assert decide(SPEED, source(tmp_path, made, both, *singles))[0] == NOT_RUN


def test_the_papers_size_is_decided_by_models_of_about_it(tmp_path):
    start = compressed("start", 1)
    assert decide(DEPTH, source(tmp_path, start, recovery(1, 2.0)))[0] == NOT_RUN
    for parameters, verdict in ((227_100_000, REPRODUCED), (240_000_000, NOT_REPRODUCED)):
        found = decide(DEPTH, source(tmp_path, start, recovery(1, 2.0) | {"parameters": parameters}))
        assert found[:2] == (verdict, [float(parameters)])


def test_the_table_of_the_measured_experiments():
    """Those of docs/sgt.md and docs/depth.md, by their records."""
    found = read_sources([RESULTS / f"2026-11-22-{name}" for name in ("sgt", "depth")])
    verdicts = {each.says: decide(each, found) for each in CLAIMS}
    assert {says for says, (verdict, *_) in verdicts.items() if verdict == REPRODUCED} == {
        SEMANTIC.says, EFFICIENCY.says
    }  # fmt: skip
    assert {says for says, (verdict, *_) in verdicts.items() if verdict == NOT_REPRODUCED} == {
        each.says for each in (RECOVER, MEANING, COS, RATIO, SHUFFLED)
    }
    table = markdown(claims(found))
    assert "| 0.67 | 0.670 ± 0.004 (3) | 1, 2, 3 | semantic, alpha 0.7 (12.9M); 2026-11-22-sgt |" in table
    assert "| 15.0 ± 0.7 % (3) | 1, 2, 3 | average, distilled (12.9M); against 24 layers (26.5M);" in table
    assert "| -0.247 ± 0.019 (3) |" in table and "| -0.138 ± 0.004 (3) |" in table


def test_every_claim_stands_in_the_papers_page():
    page = (RESULTS.parents[1] / "docs/paper.md").read_text()
    for each in CLAIMS:
        assert f"| {each.says} | {each.paper} | " in page
