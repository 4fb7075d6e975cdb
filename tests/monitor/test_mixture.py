"""What is kept of a mixture's reports, and when an expert counts as left out."""

from cherry_megatron.monitor.mixture import MixtureWatch


def heard(*responsibilities):
    tags = {f"cherry/moee/responsibility/{e}": value for e, value in enumerate(responsibilities)}
    return {"lm loss": 3.0, **tags, "cherry/moee/gate-entropy": 0.5, "cherry/moee/gate-entropy validation": 0.6}


def test_a_step_keeps_the_mixtures_own_values():
    found = MixtureWatch().step_ended(heard(0.25, 0.75))
    assert found == {"moee": {"responsibility/0": 0.25, "responsibility/1": 0.75, "gate-entropy": 0.5}}


def test_a_single_model_has_neither_values_nor_alarms():
    watch = MixtureWatch()
    assert watch.step_ended({"lm loss": 3.0}) == {}
    assert watch.alarms() == []


def test_an_expert_is_left_out_if_it_has_next_to_nothing_in_every_step():
    watch = MixtureWatch()
    for shares in ((0.0, 0.04, 0.96), (0.02, 0.0, 0.98)):
        watch.step_ended(heard(*shares))
    (line,) = watch.alarms()
    assert line.startswith(
        "expert 0 is left out: responsible for less than 3.3% of the tokens in each of the last 2"
    )
    watch.step_ended(heard(0.1, 0.1, 0.8))
    assert watch.alarms() == []
