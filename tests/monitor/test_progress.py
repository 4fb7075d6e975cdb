"""What a training prints, a line for each thing."""


def test_two_evaluations_at_one_step_are_told_apart(tmp_path, write_config, train):
    """Megatron evaluates once more after the last step, and goes on in the held-out text."""
    path = write_config(tmp_path, megatron={"eval-interval": 2})
    train(path, flags="--train-iters 4")
    printed = (tmp_path / "output/rank0.out").read_text().splitlines()
    lines = [line.split() for line in printed if "held-out loss" in line]
    assert [line[1] for line in lines] == ["2", "4", "4"]
    ends = [" ".join(line[5:]) for line in lines]
    assert ends[0] == ends[1] == "on the next 1 batches" and ends[2] == "on 1 further batches, after training"
