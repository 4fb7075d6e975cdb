"""Megatron-core and megatron.training on a machine without a GPU.

Megatron addresses its device as 'cuda' throughout. `activate()` answers those calls with the CPU
and gloo, so that the code which trains on a cluster is the code that is developed and tested on a
laptop. It refuses to act where a GPU is in use.
"""

import contextlib
import functools
import logging
import os
import sys
import types
from typing import Any

import torch

from cherry_megatron.platform.uneven import allow_uneven_messages

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_active = False


def is_active() -> bool:
    """True after `activate()` in this process."""
    return _active


def activate() -> None:
    """Make Megatron run on the CPU in this process. Calling it again does nothing.

    Raises:
        RuntimeError: if this process can use a GPU.
    """
    global _active
    if _active:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU platform does not run where a GPU is in use")
    # torch.compile would spend minutes compiling small fused functions for the CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if sys.platform == "linux" and _single_node():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _redirect_device()
    _redirect_cuda_module()
    _redirect_rng()
    allow_uneven_messages()
    _patch_megatron()
    _active = True


def _single_node() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_device() -> None:
    """`device='cuda'`, `Tensor.cuda()` and `Tensor.to('cuda')` mean the CPU."""

    def on_cpu(factory: Any) -> Any:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return call

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(torch.Tensor, name, on_cpu(getattr(torch.Tensor, name)))

    to, type_name = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(to)
    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_CPU if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)

    @functools.wraps(type_name)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The mixed-precision and distributed optimizers sort parameters by 'torch.cuda.*' names.
        if args or kwargs:
            return type_name(self, *args, **kwargs)
        return type_name(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = tensor_to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = tensor_type  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, *_args: None  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]


class _Stream:
    """Stands in for streams and events: on the CPU everything is in order already."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.device = _CPU

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: None

    def record_event(self, *_args: Any) -> "_Stream":
        return self

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_exc: Any) -> None:
        return None


def _redirect_cuda_module() -> None:
    cuda = torch.cuda
    nothing = lambda *_args, **_kwargs: None  # noqa: E731
    cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    cuda.device_count = lambda: 1
    cuda.set_device = nothing
    cuda.synchronize = nothing
    cuda.empty_cache = nothing
    cuda.Stream = cuda.Event = _Stream  # type: ignore[misc,assignment]
    cuda.current_stream = cuda.default_stream = _Stream  # type: ignore[assignment]
    cuda.stream = lambda *_args: contextlib.nullcontext()  # type: ignore[assignment]
    cuda.device = lambda *_args: contextlib.nullcontext()  # type: ignore[assignment,misc]
    cuda.get_device_capability = lambda *_args: (0, 0)
    properties = types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1)
    cuda.get_device_properties = lambda *_args: properties  # type: ignore[assignment]


def _redirect_rng() -> None:
    """The CPU generator takes the place of the CUDA one, so dropout resumes exactly."""
    cuda = torch.cuda
    get = lambda *_args, **_kwargs: torch.get_rng_state()  # noqa: E731
    put = lambda state, *_args, **_kwargs: torch.set_rng_state(state)  # noqa: E731
    cuda.get_rng_state = cuda.random.get_rng_state = get
    cuda.set_rng_state = cuda.random.set_rng_state = put  # type: ignore[assignment]
    # torch.manual_seed seeds every CUDA generator through manual_seed_all: keep that apart.
    cuda.manual_seed = cuda.random.manual_seed = torch.default_generator.manual_seed  # type: ignore[assignment]

    iterate = torch.utils.data.DataLoader.__iter__

    def iterate_quietly(self: Any) -> Any:
        # A loader draws a seed when it starts, after a resume at another place than without one.
        with torch.random.fork_rng(devices=[]):
            return iterate(self)

    torch.utils.data.DataLoader.__iter__ = iterate_quietly  # type: ignore[method-assign]

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = get
    megatron_random._set_cuda_rng_state = put
    # One generator for both roles: the warning that the CPU state changed says nothing here.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)


def _patch_megatron() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.training import training

    from cherry_megatron.platform.adam import ContractAdam

    torch._dynamo.config.disable = True
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    optimizer.Adam = ContractAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
