"""Stock Megatron's memory is that of the rank of which `cherry pretrain` tells: of the last pipeline stage."""

import json
import sys

import pytest


@pytest.mark.parametrize(("rank", "writes"), [("0", False), ("1", True)])
def test_the_last_rank_tells(rank, writes, benchmark_script, tmp_path, monkeypatch):
    script = benchmark_script("stock_megatron")
    monkeypatch.setattr(script, "prepare", lambda: None)
    monkeypatch.setattr(script, "flags", lambda config, machine, options: {})
    monkeypatch.setattr(script, "train", lambda given: [1.0, 2.0])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["s", "--config", "configs/cherry_tiny.yaml", "--output", str(output)])
    script.main()
    assert output.exists() == writes
    assert not writes or json.loads(output.read_text())["seconds"] == [1.0, 2.0]
