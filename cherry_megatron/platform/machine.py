"""What this machine offers and what will be used: the one place that decides it.

`cherry doctor` prints it, `prepare()` puts it in force before Megatron is used.
"""

import importlib
import importlib.metadata
import os
from dataclasses import dataclass, field
from functools import cache

import torch

from cherry_megatron.platform import cpu, learning_rates, optimizer_state, unpickling, wheel
from cherry_megatron.versions import installed_version


@dataclass(frozen=True)
class Library:
    """An optional library: whether it is installed, usable, and what to know about it."""

    name: str
    version: str | None
    usable: bool
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """Devices, optional libraries and the Megatron flags that follow from them.

    Attributes:
        devices: names of the GPUs, or empty.
        libraries: Transformer Engine, apex; of DALI see `dali`.
        flags: Megatron flags that this machine needs; a configuration may override them.
    """

    devices: tuple[str, ...]
    libraries: tuple[Library, ...]
    flags: dict[str, object] = field(default_factory=dict)

    def usable(self, name: str) -> bool:
        return any(library.name == name and library.usable for library in self.libraries)


@cache
def inspect_machine() -> Machine:
    """Look at this machine. Does not change anything."""
    has_gpu = torch.cuda.is_available()
    devices = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if has_gpu else ()
    libraries = (_transformer_engine(has_gpu), _apex(has_gpu))
    usable = {library.name for library in libraries if library.usable}
    flags: dict[str, object] = {
        "transformer-impl": "transformer_engine" if "transformer-engine" in usable else "local"
    }
    if "apex" not in usable:
        flags["no-gradient-accumulation-fusion"] = True
    if "transformer-engine" not in usable:
        flags["no-rope-fusion"] = True
        flags["no-persist-layer-norm"] = True
    if not has_gpu:
        flags["distributed-backend"] = "gloo"
        flags["num-workers"] = 0
        flags["no-masked-softmax-fusion"] = True
    return Machine(devices, libraries, flags)


def _transformer_engine(has_gpu: bool) -> Library:
    version = installed_version("transformer-engine")
    if version is None:
        return Library("transformer-engine", None, False, "not installed; local layers are used, without FP8")
    if not has_gpu:
        return Library("transformer-engine", version, False, "needs a GPU; local layers are used")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        return Library("transformer-engine", version, False, f"does not import: {_first_line(error)}")
    return Library("transformer-engine", version, True)


def _apex(has_gpu: bool) -> Library:
    """NVIDIA's apex is built from source; the PyPI project of that name is something else."""
    version = installed_version("apex")
    if version is None:
        return Library("apex", None, False, "not installed (optional)")
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except Exception:
        why = "not NVIDIA's apex, or built without its CUDA extensions; ignored"
        return Library("apex", version, False, why)
    return Library("apex", version, has_gpu, "" if has_gpu else "needs a GPU")


@cache
def dali() -> Library:
    """DALI, after a try on this rank's GPU or the CPU. Only who asks pays for its import, half a second."""
    try:
        library = importlib.import_module("nvidia.dali")
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in ("nvidia", "nvidia.dali")
        why = "not installed (optional)" if missing else f"does not import: {_first_line(error)}"
        return Library("nvidia-dali", None, False, why)
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else None
    try:
        pipeline = library.Pipeline(batch_size=1, num_threads=1, device_id=device)
        with pipeline:
            one = library.fn.constant(idata=1)
            pipeline.set_outputs(one if device is None else one.gpu())
        pipeline.run()
    except Exception as error:
        return Library("nvidia-dali", library.__version__, False, f"does not run: {_first_line(error)}")
    return Library("nvidia-dali", library.__version__, True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def prepare() -> Machine:
    """Make this process ready for Megatron: CPU platform if there is no GPU, ranks from SLURM."""
    machine = inspect_machine()
    _ranks()
    # Before Blackwell, Megatron needs it to order communication and kernels of tensor parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not machine.devices:
        cpu.activate()
    wheel.use_shipped_helpers()
    optimizer_state.save_by_parameter()
    learning_rates.resume_with_own_rates()
    unpickling.refuse_foreign_pickles()
    return machine


def _ranks() -> None:
    """Fill in torch.distributed's variables from srun, or for a single process."""
    if "RANK" in os.environ:
        return
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        if "SLURM_NTASKS_PER_NODE" in os.environ:
            os.environ["LOCAL_WORLD_SIZE"] = os.environ["SLURM_NTASKS_PER_NODE"]
        return
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # A process alone takes any free port, at the moment when it needs it.
    os.environ.setdefault("MASTER_PORT", "0")
