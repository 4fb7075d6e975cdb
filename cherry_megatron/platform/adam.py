"""Adam with the contract that Megatron's optimizers expect of a fused implementation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import adam, adamw


class ContractAdam(torch.optim.Optimizer):
    """Adam or AdamW whose step count lives in the parameter group.

    Megatron's distributed optimizer saves and reshards `exp_avg` and `exp_avg_sq` as flat shards
    and takes `step` from the parameter group, as FusedAdam of Transformer Engine and apex keep
    it. torch.optim.AdamW keeps a step tensor per parameter instead, on which its `state_dict`
    fails. The arithmetic here is torch's own functional implementation.

    Args:
        params: parameters or parameter groups.
        lr, betas, eps, weight_decay: as in Kingma & Ba (2015) and Loshchilov & Hutter (2019).
        adam_w_mode: decoupled weight decay (AdamW) if true, L2 added to the gradient if false.
        capturable: accepted because Megatron passes it; must be false.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("ContractAdam cannot be captured in a CUDA graph")
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        functional = adamw.adamw if self.adam_w_mode else adam.adam
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # The functional form counts the step itself, on the tensors it is given.
            done = group.get("step", 0)
            group["step"] = done + 1
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            functional(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(done)) for _ in params],
                foreach=False,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss
