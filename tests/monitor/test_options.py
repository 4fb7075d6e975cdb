"""What the `guards` section may say."""

from pathlib import Path

import pytest

from cherry_megatron.config import outline
from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.options import Guards
from cherry_megatron.sections import section_of

REFUSED = {
    "guards.not_finite 'ignore' is not one of stop, skip, rewind": {"not_finite": "ignore"},
    "guards.not_finite None is not one of": {"not_finite": None},
    "guards.spike False is not one of": {"spike": False},
    "guards.spike_sigmas 0.0 must be positive": {"spike_sigmas": 0},
    "guards.spike_window 1 is not from 2 to 1000": {"spike_window": 1},
    "guards.rewind_batches 0 must be at least 1": {"rewind_batches": 0},
    "guards.most 0 must be at least 1": {"most": 0},
    "steps are counted from 1": {"leave_out": [0]},
    "guards.hang_seconds -1 is negative; 0 is never": {"hang_seconds": -1},
    "guards.straggler 0.9 must be more than 1": {"straggler": 0.9},
    "unknown key guards.nan; known are": {"nan": "stop"},
}


@pytest.mark.parametrize("says", REFUSED)
def test_refused(says):
    with pytest.raises(CherryError) as error:
        section_of(Path("c.yaml"), "guards", Guards, REFUSED[says])
    assert says in str(error.value) and str(error.value).startswith("c.yaml: ")


def test_what_may_be_said():
    found = section_of(Path("c.yaml"), "guards", Guards, {"spike": "rewind", "leave_out": [3], "straggler": 0})
    assert found == Guards(spike="rewind", leave_out=(3,), straggler=0.0) and not found.skips
    assert Guards(not_finite="skip").skips and Guards(spike="skip").skips


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("iterations-to-skip: [3]", "use guards.leave_out"),
        ("optimizer-cuda-graph: true", "the guards decide on each update"),
    ],
)
def test_flags_of_megatron_that_do_not_go_with_guards(setting, says, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"run: r\nrecurrence: {{pattern: '*-'}}\nmegatron: {{{setting}}}\n")
    with pytest.raises(CherryError, match=says):
        outline(path)
