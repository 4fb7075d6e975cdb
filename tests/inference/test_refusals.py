"""What a configuration and a command line may not say of generation: one clear line, and nothing written."""

from pathlib import Path

import pytest

from tests.test_bad_input import check, check_configuration

CONFIGS = {
    "no-tokens-to-generate": ({"generation": {"prompts": "x", "tokens": 0}}, [], "generation.tokens 0 must"),
    "negative-temperature": (
        {"generation": {"prompts": "x", "temperature": -0.5}},
        [],
        "generation.temperature -0.5 must be a finite number",
    ),
    "no-share-to-draw-from": (
        {"generation": {"prompts": "x", "top_p": 0}},
        [],
        "generation.top_p 0.0 must be more than 0",
    ),
    "attention-that-is-not-cached": (
        {"generation": {"prompts": "x"}, "megatron": {"window-size": "8,0"}},
        [],
        "megatron.window-size does not go with generation",
    ),
    "generation-without-prompts": ({"generation": {"tokens": 3}}, [], "generation.prompts is missing"),
    "missing-prompts": ({"generation": {"prompts": "nowhere.txt"}}, [], "nowhere.txt: No such file"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name, tmp_path: Path, write_config):
    check_configuration(tmp_path, write_config, *CONFIGS[name])


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("\ufeff\n \n".encode(), "prompts.txt holds no prompt"),
        ("서울".encode("cp949"), "prompts.txt is not a UTF-8 text file"),
        (("서울\n\n" + "서울 부산 " * 12).encode(), "new ones do not fit into megatron.seq-length 32"),
    ],
)
def test_prompts(prompts, says, tmp_path: Path, write_config):
    (tmp_path / "prompts.txt").write_bytes(prompts)
    path = write_config(tmp_path, generation={"prompts": "prompts.txt", "tokens": 8})
    check(tmp_path, ["pretrain", "--config", str(path)], says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "서울"], "has no checkpoint to generate with"),
        (["--prompt", "서울", "부산\udcff"], "--prompt: prompt 2 is blank or no UTF-8 text"),
        (["--prompt", "서울", "--tokens", "32"], "do not fit into megatron.seq-length 32"),
        (["--prompt", "서울", "--loops", "0"], "--loops 0 must be a positive number"),
        (["--prompt", "서울", "--top-k", "-1"], "generation.top_k -1 must not be negative"),
        (["--prompt", "서울", "--top-p", "1.5"], "generation.top_p 1.5 must be more than 0 and at most 1"),
        (["--prompt", "서울", "--draft-loops", "3"], "--draft-loops 3 must be from 1 to 2"),
        (["--prompt", "서울", "--draft-loops", "1", "--draft-tokens", "0"], "--draft-tokens 0 must be at least 1"),
        (["--prompt", "서울", "--draft-tokens", "2"], "--draft-tokens 2 needs --draft-loops"),
        (["--prompt", "서울", "--draft-mtp"], "--draft-mtp: the model has no multi-token prediction"),
        (["--prompt", "서울", "--", "--softmax-type", "off-by-one"], "softmax-type does not go with generation"),
    ],
)
def test_generate(arguments, says, tmp_path: Path, write_config):
    check(tmp_path, ["generate", "--config", str(write_config(tmp_path)), "--tokens", "8", *arguments], says)
