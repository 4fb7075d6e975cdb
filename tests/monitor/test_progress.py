"""What a training prints, a line for each thing."""

from types import SimpleNamespace

from cherry_megatron.monitor.progress import Progress


def test_a_model_that_has_hardly_begun_is_not_judged():
    def under_way(iteration, last, skip_train=False, samples=None):
        args = SimpleNamespace(
            skip_train=skip_train, train_iters=last, iteration=iteration, curr_iteration=-1, train_samples=samples,
            global_batch_size=8,
        )  # fmt: skip
        progress = Progress.__new__(Progress)
        progress._args, progress.before_first_step = args, False
        return progress.under_way

    for skip_train in (False, True):  # `cherry evaluate` judges no earlier than the training itself
        assert under_way(100, 900, skip_train) and under_way(200, 2000, skip_train)
        assert not under_way(99, 100, skip_train) and not under_way(199, 2000, skip_train)
    assert under_way(200, None, True, 16000) and not under_way(199, None, True, 16000)


def test_two_evaluations_at_one_step_are_told_apart(tmp_path, write_config, train):
    """Megatron evaluates once more after the last step, and goes on in the held-out text."""
    path = write_config(tmp_path, megatron={"eval-interval": 2})
    train(path, flags="--train-iters 4")
    printed = (tmp_path / "output/rank0.out").read_text().splitlines()
    lines = [line.split() for line in printed if "held-out loss" in line]
    assert [line[1] for line in lines] == ["2", "4", "4"]
    ends = [" ".join(line[5:]) for line in lines]
    assert ends[0] == ends[1] == "on the next 1 batches" and ends[2] == "on 1 further batches, after training"
