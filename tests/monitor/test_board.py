"""TensorBoard's page of real runs: what is written for it, `cherry board`, and how it looks in a browser."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.pictures import shares_of_layers, shares_of_models
from cherry_megatron.monitor.serving import find_runs, serve
from tests.browser import browser, colours

CATEGORIES = ["Training", "SGT", "Recurrence", "MoEE", "Speed", "Health"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, write_config, train) -> Path:
    """The folder of a run of a selective mixture, which has all that the page can show."""
    folder = tmp_path_factory.mktemp("board") / "mixed"
    path = write_config(
        folder,
        recurrence={"pattern": "*-[*-]x2*-"},
        evaluation={"at_start": True},
        sgt={"top_loss": 0.25, "alpha": 0.7},
        megatron={"train-iters": 10, "eval-interval": 5},
    )
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"moee": {"experts": 2, "top_k": 1, "prefix": 8, "router_hidden": 8}}))
    train(path)
    return folder / "run"


@pytest.fixture(scope="module")
def runs(mixed, speaking) -> list[Path]:
    """It, and a run of one model that generates."""
    return [mixed, speaking.parent / "run"]


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    found.Reload()
    return found


def layout(run: Path) -> dict[str, dict[str, list[str]]]:
    (event,) = events(run).Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {c.title: {chart.title: [*chart.multiline.tag] for chart in c.chart} for c in page.category}


def test_every_chart_has_curves(runs):
    pages = [layout(run) for run in runs]
    assert [*pages[0]] == CATEGORIES and [*pages[1]] == ["Training", "Recurrence", "Speed", "Health"]
    for run, page in zip(runs, pages, strict=True):
        tags = events(run).Tags()["scalars"]
        for title, curves in ((title, curves) for charts in page.values() for title, curves in charts.items()):
            for curve in curves:
                assert any(re.match(curve, tag) for tag in tags), (title, curve)


def test_charts_are_of_what_their_titles_say(runs):
    tags = events(runs[0]).Tags()["scalars"]

    def shown(category: str, title: str) -> set[str]:
        return {tag for curve in layout(runs[0])[category][title] for tag in tags if re.match(curve, tag)}

    assert shown("Training", "loss, nats a token") == {"lm loss", "lm loss validation"}
    parts = {"selected loss", "unselected loss", "weighted loss"}
    assert shown("SGT", "training loss by part") == parts
    assert shown("Recurrence", "held-out loss by number of loops") == {f"cherry/loss-by-loops/{n}" for n in (1, 2)}
    assert shown("MoEE", "load of each expert") == {"cherry/moee/load/0", "cherry/moee/load/1"}
    assert shown("Health", "alarms so far") == {"cherry/alarms/so-far"}


def test_the_held_out_loss_is_that_of_all_loops(runs):
    for run, loops in zip(runs, (2, 3), strict=True):
        found = events(run)
        losses, all_loops = found.Scalars("cherry/held-out-loss"), found.Scalars(f"cherry/loss-by-loops/{loops}")
        assert [(e.step, e.value) for e in losses] == [(e.step, e.value) for e in all_loops] != []


def hyperparameters(run: Path, tag: str) -> HParamsPluginData:
    content = events(run).summary_metadata[f"_hparams_/{tag}"].plugin_data.content
    return HParamsPluginData.FromString(content)


def test_settings_are_hyperparameters_and_a_run_tells_of_its_end(mixed):
    start = hyperparameters(mixed, "session_start_info").session_start_info.hparams
    assert start["recurrence.pattern"].string_value == "*-[*-]x2*-" and start["recurrence.loops"].number_value == 2
    assert start["sgt.top_loss"].number_value == 0.25 and start["moee.experts"].number_value == 2
    assert start["lr"].number_value == 1e-3 and start["seed"].number_value == 1234
    assert "_hparams_/session_end_info" in events(mixed).summary_metadata
    measured = [info.name.tag for info in hyperparameters(mixed, "experiment").experiment.metric_infos]
    assert {*measured} <= {*events(mixed).Tags()["scalars"]}, "a metric that is no scalar of the run"
    # No run of its own, as `add_hparams` would have made.
    assert [path.name.split(".")[0] for path in (mixed / "tensorboard").rglob("*") if path.is_file()] == ["events"]


def test_all_runs_have_the_same_hyperparameters(runs):
    """TensorBoard takes the list of one run for all."""
    starts = [hyperparameters(run, "session_start_info").session_start_info.hparams for run in runs]
    kinds = [{name: value.WhichOneof("kind") for name, value in start.items()} for start in starts]
    assert kinds[0] == kinds[1] and starts[1]["moee.experts"].number_value == 0
    for run in runs:
        listed = hyperparameters(run, "experiment").experiment.hparam_infos
        assert {info.name for info in listed} == {*kinds[0]}


def test_texts_are_ours_alone_and_have_all_arguments(runs):
    texts = {tag for tag in events(runs[1]).Tags()["tensors"] if tag.endswith("/text_summary")}
    names = ("generation/text", "run/arguments", "run/configuration")
    assert texts == {f"cherry/{name}/text_summary" for name in names}

    def lines(name: str) -> list[str]:
        (event,) = events(runs[1]).Tensors(f"cherry/{name}/text_summary")
        return event.tensor_proto.string_val[0].decode().splitlines()

    assert all(line.startswith("    ") for name in names[1:] for line in lines(name)), "Markdown takes it for more"
    assert "    global_batch_size: 4" in lines("run/arguments") and len(lines("run/arguments")) > 500
    written = yaml.safe_load("\n".join(lines("run/configuration")))
    assert written == yaml.safe_load((runs[1] / "config.yaml").read_text())


def test_pictures_of_each_evaluation(runs, tmp_path):
    def pictures(run: Path, name: str) -> list:
        return events(run).Images(f"cherry/pictures/{name}")

    assert [event.step for event in pictures(runs[0], "loss-by-loops")] == [0, 5, 10]
    assert [event.step for event in pictures(runs[0], "experts")] == [0, 5, 10]
    assert "cherry/pictures/experts" not in events(runs[1]).Tags()["images"]
    for name in ("loss-by-loops", "experts"):
        path = tmp_path / f"{name}.png"
        path.write_bytes(pictures(runs[0], name)[-1].encoded_image_string)
        found = colours(path)
        assert len(found) > 10 and found[255, 255, 255] < 0.99 * sum(found.values())


def test_what_a_picture_of_experts_shows():
    reported = {"load/0": 0.75, "load/1": 0.25, "responsibility/0": 0.5, "responsibility/1": 0.5, "wanted/1": 1.0}
    assert shares_of_models({**reported, "loss/0": 3.0, "load/layer-2/0": 1.0}) == {
        "load": [0.75, 0.25], "responsibility": [0.5, 0.5]
    }  # fmt: skip
    whole = {"load/layer-2/0": 0.5, "load/layer-2/1": 0.5, "gate-entropy/layer-2": 1.0}
    assert shares_of_layers(whole) == {"layer-2": [0.5, 0.5]} and shares_of_models(whole) == {}
    walks = {
        "load/layer-2/loop-1/0": 0.9,
        "load/layer-2/loop-1/1": 0.1,
        "load/layer-3b/1": 1.0,
        "load/layer-3b/0": 0,
    }
    assert shares_of_layers({**whole, **walks}) == {"layer-2 loop-1": [0.9, 0.1], "layer-3b": [0, 1.0]}


def test_runs_are_found_by_name(tmp_path):
    for name in ("all/a", "all/b/seed-1", "all/.hidden", "other"):
        (tmp_path / name / "tensorboard").mkdir(parents=True)
        (tmp_path / name / "tensorboard/events.out.tfevents.1").touch()
    (tmp_path / "all/empty/tensorboard").mkdir(parents=True)
    assert find_runs([tmp_path / "all"]) == {
        "a": tmp_path / "all/a/tensorboard", "b/seed-1": tmp_path / "all/b/seed-1/tensorboard"
    }  # fmt: skip
    assert [*find_runs([tmp_path / "other", tmp_path / "all/b", tmp_path / "other"])] == ["other", "all/b/seed-1"]
    assert [*find_runs([tmp_path / "other"])] == ["other"]


@pytest.mark.parametrize(
    ("folders", "address", "says"),
    [
        (["none"], ("localhost", 0), "{0}/none is no folder; name the folder of a run"),
        (["file"], ("localhost", 0), "{0}/file is no folder"),
        (["run", "empty"], ("localhost", 0), "{0}/empty has no tensorboard/ with events"),
        (["run", "run/logs"], ("localhost", 0), "{0}/run/logs lies in the folder of the run {0}/run; name one"),
        (["run"], ("localhost", 70000), "cannot listen on --host localhost --port 70000 (bind(): port must be"),
        (["run"], ("no.such.host.invalid", 0), "cannot listen on --host no.such.host.invalid --port 0 ("),
        (["run"], ("localhost", None), "Address already in use"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, folders, address, says):
    for name in ("run", "run/logs"):
        (tmp_path / name / "tensorboard").mkdir(parents=True)
        (tmp_path / name / "tensorboard/events.out.tfevents.1").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with socket.create_server(("localhost", 0)) as taken, pytest.raises(CherryError) as error:
        host, port = address
        serve([tmp_path / folder for folder in folders], host, taken.getsockname()[1] if port is None else port)
    assert says.format(tmp_path) in str(error.value) and "\n" not in str(error.value)


@contextmanager
def served(runs: list[Path]) -> Iterator[str]:
    """The address of a `cherry board` on runs; at its end it must go well, and leave nothing."""
    command = [sys.executable, "-m", "cherry_megatron.cli", "board", *map(str, runs), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("2 run(s): board")
        url = process.stdout.readline().strip()
        assert url.endswith("/#custom_scalars")
        yield url.removesuffix("#custom_scalars")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_page_in_a_browser(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with browser() as page, served(runs) as url:
        page.open(f"{url}#custom_scalars")
        titles = [title for run in runs for charts in layout(run).values() for title in charts]
        page.resize(1400, 6000)  # charts outside the window wait to be looked at
        page.wait_for([*CATEGORIES, *titles, "Matches ("], gone="Matches (0)")
        page.screenshot(tmp_path / "page.png", 1400, 6000)
        # Curves of both runs in TensorBoard's colours, beside the greys and the orange of its head.
        vivid = [colour for colour in colours(tmp_path / "page.png") if max(colour) - min(colour) > 150]
        assert len(vivid) > 20, "no curve is drawn"
        for tab, words in {
            "images": ["cherry/pictures/loss-by-loops", "cherry/pictures/experts"],
            "text": ["cherry/generation/text", "the model"],
            "hparams": ["recurrence.pattern", "moee.experts"],
        }.items():
            page.open("about:blank")
            page.open(f"{url}#{tab}")
            page.wait_for(words)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("cherry-board-")], "links are left"
