"""The attention implementation of a phase: transformers' own, one of SDPA's kernels, a package's or the hub's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..diagnose import ceilings
from ..errors import TransformError
from ..machine import gpus
from ..model import seam
from ..runtime import attention_sdpa, attention_slots
from ..runtime.variant import Stage, Transform
from . import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..diagnose.costs import Profile
    from ..machine.gpus import Capability
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

PROBE_TOKENS = 4  # tokens of the request that shows which kernel runs; fewer than any sliding window
ON = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Needs:
    """What an implementation needs from the model, the machine and the process.

    Args:
        kind: kind of attention that the model class must declare support for; None: every model supports it.
        devices: device types it runs on.
        oldest, newest: lowest and highest compute capability that its kernels exist for; None: no bound.
        head_size: the largest head size it takes; None: any.
        half: whether it takes only FP16 and BF16.
        package: package that must be importable; None: none.
        mask: whether it takes an attention mask. A static cache needs one.
    """

    kind: Literal["sdpa", "flash", "flex"] | None = "sdpa"
    devices: tuple[str, ...] = ("cuda",)
    oldest: Capability | None = (8, 0)
    newest: Capability | None = None
    head_size: int | None = 256
    half: bool = True
    package: str | None = None
    mask: bool = False


FLASH: Literal["flash"] = "flash"
HOPPER: Capability = (9, 9)  # upper bound for FlashAttention 3, which uses instructions that only Hopper (9.x) has

# Sources: torch's sdp_utils.cpp (architectures and head sizes of its flash, cuDNN and memory-efficient kernels),
# flash-attention's README (version 2: Ampere and later, 3: Hopper, 4: Hopper and Blackwell; head sizes up to 256).
IMPLEMENTATIONS: Mapping[str, Needs] = {
    "eager": Needs(None, ("cpu", "cuda"), None, head_size=None, half=False, mask=True),
    "sdpa": Needs(devices=("cpu", "cuda"), oldest=None, head_size=None, half=False, mask=True),
    "sdpa:flash": Needs(devices=("cpu", "cuda")),
    "sdpa:cudnn": Needs(head_size=128, mask=True),
    "sdpa:efficient": Needs(oldest=(5, 0), head_size=None, half=False, mask=True),
    "sdpa:math": Needs(devices=("cpu", "cuda"), oldest=None, head_size=None, half=False, mask=True),
    "flex_attention": Needs("flex", head_size=None, half=False, package="triton", mask=True),
    "flash_attention_2": Needs(FLASH, package="flash_attn"),
    "flash_attention_3": Needs(FLASH, oldest=(9, 0), newest=HOPPER, package="flash_attn_interface"),
    "flash_attention_4": Needs(FLASH, oldest=(9, 0), package="flash_attn.cute"),
    "kernels-community/flash-attn2": Needs(FLASH, package="kernels"),
    "kernels-community/flash-attn3": Needs(FLASH, oldest=(9, 0), newest=HOPPER, package="kernels"),
    "kernels-community/vllm-flash-attn3": Needs(FLASH, oldest=(9, 0), newest=HOPPER, package="kernels"),
    "kernels-community/flash-attn4": Needs(FLASH, oldest=(9, 0), package="kernels"),
}


@dataclass(frozen=True)
class Attention(Transform):
    """Use another attention implementation in the twin; the original keeps its own.

    Args:
        implementation: "eager", "sdpa" (which chooses a kernel at each call), one of its kernels ("sdpa:flash",
            "sdpa:cudnn", "sdpa:efficient", "sdpa:math"), "flex_attention", a package ("flash_attention_2", 3 or 4), or
            a kernel of the hub, named by its repository ("kernels-community/flash-attn2").
    """

    implementation: str = "sdpa"

    name: ClassVar[str] = "attention"
    stage: ClassVar[Stage] = Stage.ATTENTION
    summary: ClassVar[str] = "another attention: SDPA's kernels, FlashAttention 2 to 4, the hub's, FlexAttention"
    sharded: ClassVar[bool] = True
    lossless: ClassVar[bool] = True
    sets: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        require(self.implementation, IMPLEMENTATIONS, "attention: implementation")

    @property
    def registered(self) -> str:
        """The name of the implementation in transformers' registry."""
        return attention_sdpa.KERNELS[self.backend].name if self.backend else self.implementation

    @property
    def backend(self) -> str:
        """The name of SDPA's kernel; "" for the other implementations."""
        return self.implementation.partition(":")[2]

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        model, wanted = variant.original, self.implementation
        if all(seam.attentions_of(variant.modules[phase]) == {self.registered} for phase in self.phases):
            return f"{wanted} is in use for {' and '.join(self.phases)} already"
        if not seam.exchangeable_attention(model):
            return f"{type(model).__name__} has no exchangeable attention"
        if "decode" in self.phases and attention_slots.is_used(variant.modules["decode"]):
            return "slot_attention is in use for decode, and reads fewer slots"
        needs = IMPLEMENTATIONS[wanted]
        if needs.kind is not None and not seam.supports(model, needs.kind):
            return f"{type(model).__name__} does not support {wanted}"
        if hardware.device not in needs.devices:
            return f"{wanted} needs a {' or '.join(needs.devices).upper()} device"
        return (
            _unfit_gpu(wanted, needs, hardware)
            or self._unfit_model(variant, needs, hardware)
            or (_missing(needs.package) if needs.package else None)
            or _unaccepted(wanted)
            or (_not_fetched(wanted) if "/" in wanted else None)
        )

    def _unfit_model(self, variant: Variant, needs: Needs, hardware: Hardware) -> str | None:
        from ..diagnose.work import attention_layers

        wanted = self.implementation
        if needs.half and hardware.device != "cpu" and (reason := unfit_dtype(wanted, variant.original)):
            return reason
        size = max((layer.head_size for layer in attention_layers(variant.original)), default=0)
        if needs.head_size is not None and size > needs.head_size:
            return f"{wanted} takes heads of up to {needs.head_size} numbers; this model's have {size}"
        kernel = attention_sdpa.kernel(self.backend, torch.device(hardware.device)) if self.backend else None
        masks = kernel.masks if kernel is not None else needs.mask
        if not masks and "decode" in self.phases and variant.caches is not None:
            return f"{wanted} takes no mask, and a static cache needs one for the slots that are empty"
        return None

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        return {phase: ceilings.faster_attention(profile.phases[phase], hardware) for phase in self.phases}

    def apply(self, variant: Variant) -> None:
        if self.backend:
            attention_sdpa.register(self.backend)
        elif "/" in self.implementation and (reason := _not_fetched(self.implementation)):
            raise TransformError(f"{self}: {reason}")
        for twin in variant.edit(self.phase):
            try:
                seam.use_attention(twin, self.registered)
            except (ValueError, ImportError) as error:
                raise TransformError(f"{self}: {error}") from error

    def took_effect(self, variant: Variant) -> str | None:
        for phase in self.phases:
            if (used := seam.attentions_of(variant.modules[phase])) != {self.registered}:
                return f"{phase} uses {' and '.join(sorted(map(str, used)))} instead of {self.registered}"
            if self.implementation in ("eager", "sdpa", "flex_attention"):
                continue  # torch chooses their kernel, or compiles it; a compiler takes no dispatch mode
            if wrong := self._elsewhere(operators(variant.modules[phase], phase), variant.original.device):
                return f"{phase} computes attention by {wrong} instead of {self.implementation}"
        return None

    def _elsewhere(self, seen: set[str], device: torch.device) -> str | None:
        """Name the operators that computed attention instead of this implementation; None if there are none."""
        kernel = attention_sdpa.kernel(self.backend, device) if self.backend else None
        if kernel is not None and kernel.operator in seen:
            return None
        return other_attention(seen) or ("no kernel of SDPA's" if self.backend else None)


def unfit_dtype(wanted: str, model: PreTrainedModel) -> str | None:
    """Why an implementation that takes FP16 and BF16 does not take this model, or None."""
    from ..diagnose.work import activation_dtype

    if (dtype := activation_dtype(model)) in (torch.float16, torch.bfloat16):
        return None
    return f"{wanted} takes FP16 and BF16; between this model's layers it is {dtype}: load it in BF16"


def other_attention(seen: set[str]) -> str:
    """Name the operators that compute attention in torch's own ways; "" if there are none."""
    return " and ".join(sorted(name for name in seen if name.startswith("_scaled_dot_product") or "softmax" in name))


def without_mask(module: torch.nn.Module, device: torch.device) -> str | None:
    """The implementation that a module looks up and that takes no attention mask there, or None."""
    used = seam.attentions_of(module)
    for name, needs in IMPLEMENTATIONS.items():
        backend = name.partition(":")[2]
        kernel = attention_sdpa.kernel(backend, device) if backend else None
        registered = attention_sdpa.KERNELS[backend].name if backend else name
        if registered in used and not (kernel.masks if kernel is not None else needs.mask):
            return name
    return None


def operators(model: PreTrainedModel, phase: Phase) -> set[str]:
    """Names of the torch operators that run for a few tokens of a phase."""
    ids = torch.arange(1, PROBE_TOKENS + 1, dtype=torch.int64, device=model.device)[None]  # [1, PROBE_TOKENS]
    with torch.no_grad():
        if phase == "prefill":
            return operator_names(lambda: model(input_ids=ids, use_cache=True))
        cache = seam.cache_in(model(input_ids=ids, use_cache=True))
        return operator_names(lambda: model(input_ids=ids[:, :1], **seam.over(model, cache)))


def operator_names(work: Callable[[], Any]) -> set[str]:
    """Names of the torch operators that run in a piece of work."""
    seen = _Names()
    with seen:
        work()
    return seen.names


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def _unfit_gpu(wanted: str, needs: Needs, hardware: Hardware) -> str | None:
    found = gpus.capability(hardware)
    if found is not None and needs.newest is not None and found > needs.newest:
        return f"{wanted} has no kernels for {gpus.name(found)}, only up to {gpus.name(needs.newest)}"
    return gpus.too_old(hardware, needs.oldest, wanted)


@functools.cache
def _missing(package: str) -> str | None:
    """Why a package cannot be used, or None. Importing an installed package may raise any exception."""
    try:
        # checked here, because transformers would look for a substitute on the hub
        if importlib.util.find_spec(package) is None:
            return f"package {package} is not installed"
        importlib.import_module(package)
    except ModuleNotFoundError:
        return f"package {package} is not installed"
    except Exception as error:
        return f"package {package} cannot be imported: {type(error).__name__}: {error}"
    return None


def _unaccepted(wanted: str) -> str | None:
    """Why transformers rejects an installed package and would look for a substitute on the hub, or None."""
    if seam.accepts_package(wanted):
        return None
    return f"transformers does not accept the installed package for {wanted}: it is too old, or made for another device"


def _not_fetched(repository: str) -> str | None:
    """Why a kernel of the hub is not used, or None. Nothing is downloaded unless the user asks for it."""
    if os.environ.get("AUTOTUNE_ALLOW_DOWNLOADS", "").upper() in ON:
        return None
    if not cached(repository):
        return f"{repository} is not in the local cache; AUTOTUNE_ALLOW_DOWNLOADS=1 lets it be fetched"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ON:
        return None
    return f"{repository} may be fetched anew: set HF_HUB_OFFLINE=1 to use the copy in the cache"


def cached(repository: str) -> bool:
    """Whether the hub's cache holds a snapshot of a kernel."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = (os.environ.get(name) for name in ("KERNELS_CACHE", "HF_KERNELS_CACHE"))
    pattern = f"*--{repository.replace('/', '--')}/snapshots/*"
    return any(any(Path(folder).glob(pattern)) for folder in (*folders, HF_HUB_CACHE) if folder)
