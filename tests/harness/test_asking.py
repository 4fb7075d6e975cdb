"""What a model is asked does not depend on what was asked before."""

from pathlib import Path

from tests.conftest import run_ranks

TASKS = Path(__file__).parents[2] / "configs/tasks"


def asked_twice() -> list[list[str]]:
    import sys

    from lm_eval.api.model import LM

    from cherry_megatron.harness.asking import Asked, loaded_tasks, put

    class Deaf(LM):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[str] = []

        def loglikelihood(self, requests):
            self.heard += [request.args[0] for request in requests]
            return [(0.0, False)] * len(requests)

        loglikelihood_rolling = generate_until = None

    Deaf.__abstractmethods__ = frozenset()
    first, second = Deaf(), Deaf()
    asked = Asked(("cherry_ko",), TASKS, limit=6, fewshot=2)
    with loaded_tasks(asked) as tasks:
        for model in (first, second):
            put(model, tasks, asked, True, sys.stderr)
    return [first.heard, second.heard]


def test_a_second_model_gets_the_same_examples(tmp_path):
    ((first, second),) = run_ranks(tmp_path, 1, asked_twice)
    assert len(first) >= 6 and first == second
