"""A resume may have other learning rates than the steps before it.

Megatron-core 0.19.2 tells groups of parameters apart by their rates too (upstream pull request 4705), so it finds
none of the checkpoint's where these are others. `override-opt-param-scheduler`, which is fixed here, means that the
configuration's rates hold. tests/test_resume.py shows it.
"""

import functools
from typing import Any

_RATES = ("max_lr", "min_lr")


def resume_with_own_rates() -> None:
    """Have loaded groups take the rates of those that they are to become. Calling it again does nothing."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    load = DistributedOptimizer.load_state_dict
    if getattr(load, "takes_own_rates", False):
        return

    def identity(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(key) for key in param_group_identifier_keys if key not in _RATES)

    @functools.wraps(load)
    def load_with_own_rates(self: Any, state_dict: dict[str, Any]) -> None:
        own = self.optimizer.param_groups
        for group in state_dict["optimizer"]["param_groups"]:
            alike = [found for found in own if identity(found) == identity(group)]
            if len(alike) == 1:  # others differ by their rates alone (decoupled-lr)
                group.update({key: alike[0][key] for key in _RATES})
        load(self, state_dict)

    load_with_own_rates.takes_own_rates = True  # type: ignore[attr-defined]
    DistributedOptimizer.load_state_dict = load_with_own_rates
