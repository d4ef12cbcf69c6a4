"""A variant: one way to run the model, which shares every tensor with the original until a transform replaces it.

The original is never edited. `Variant.edit` gives structural copies (twins), so dropping the variant undoes everything.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ..errors import AutotuneError, DeviceError, MeasurementError, TransformError, UnreadyError, VariantError
from ..machine import device as devices
from ..machine import intraop, outside
from ..model import route, seam, sharding, stateful
from ..model.twins import fork
from ..workload import PHASES, Phase, Workload
from .batching.load import EngineLoad
from .ranks.leading import LEADER, Leading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..diagnose.costs import Profile
    from ..machine.device import Device
    from ..machine.hardware import Hardware
    from .cache.narrow import KvCache
    from .cache.pool import CachePool
    from .speculation.speculate import SpeculationSetup
    from .steps.prompts import PromptGraphs
    from .steps.step import DecodeSteps
    from .traffic import Pause, Traffic

DEFAULT_CONTEXT = 256

Loop = Callable[["Variant", seam.Sampling], Any]


class Stage(enum.IntEnum):
    """The order in which the transforms of a plan are applied. It replaces pairwise compatibility lists."""

    WEIGHTS = 1
    ATTENTION = 2
    LAYERS = 3
    CACHE = 4
    LOOP = 5
    COMPILE = 6
    GRAPH = 7
    THREADS = 8
    SPECULATION = 9
    BATCHING = 10


@dataclass(frozen=True)
class Transform:
    """One optimisation.

    Args:
        phase: the phase whose module it edits: "prefill", "decode" or "both".
    """

    phase: Literal["prefill", "decode", "both"] = "both"

    name: ClassVar[str]
    stage: ClassVar[Stage]
    summary: ClassVar[str]  # one line for `autotune transforms`
    foreign: ClassVar[bool] = False  # runs a compiler's or another library's kernels; see `is_foreign`
    recordable: ClassVar[bool] = True  # whether a program can run its decode step (`StepProgram`)
    sharded: ClassVar[bool] = False  # whether each rank of a tensor-parallel model can apply it to its own part
    lossless: ClassVar[bool] = False  # always judged at the lossless tier, even if the policy's tier is lower

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        """Why it cannot be tried on this variant and machine, or None; a `Blocker` if it should work there.

        The check is cheap and raises nothing.
        """
        return None

    def excludes(self, other: Transform) -> str | None:
        """Why it cannot be applied after another transform of the same phase, as far as both are known, or None."""
        return None

    def rehearsed(self) -> Transform | None:
        """The transform to try on a tiny model of the user's class before the user's model, or None.

        The trial shows whether the architecture works with it; see `autotune.tune.rehearsal`. It has to be quick.
        """
        return None

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best-case speed-up of each phase that it edits, from the roofline: {"decode": 2.1}."""
        raise NotImplementedError

    def extra_bytes(self, variant: Variant) -> float:
        """Bytes that it takes besides what the variant holds. It is not tried if they exceed free memory."""
        return 0.0

    def apply(self, variant: Variant) -> None:
        """Edit the variant. Raises TransformError if that turns out impossible; any other error counts as a crash.

        If `unavailable` can know the reason, it should report it: a refusal here counts as blocked.
        """
        raise NotImplementedError

    def took_effect(self, variant: Variant) -> str | None:
        """None if the variant really changed (modules replaced, graph captured, kernel used), else what is missing."""
        raise NotImplementedError

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases it edits."""
        return ("prefill", "decode") if self.phase == "both" else (self.phase,)

    @property
    def params(self) -> dict[str, Any]:
        """Parameters other than the phase, as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "phase"}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.params.items() if v != "")
        return f"{self.name}({inner})@{self.phase}" if inner else f"{self.name}@{self.phase}"


class Variant:
    """The modules and settings that serve the two phases.

    Attributes:
        original: the untouched model.
        workload: the workload it is tuned for, which decides sizes (slots, batches); None: small defaults.
        traffic: queue in which measured steps of this variant wait for live requests; None outside a wrapped model.
        modules: phase -> module that computes it; the original itself until it is edited.
        transforms: applied transforms, in order.
        threads: phase -> intra-op threads while it runs; missing means the process's own number.
        caches: pool of static KV caches, or None for the cache that generate prepares.
        loop: serves a call of generate's decoding loop (`runtime.loop.decode`); None for transformers' own loop.
        step: decode steps, recorded, compiled or captured; None to call the decode module.
        prompts: short prompts that are captured, or None to call the prefill module.
        draft: a smaller model with the same vocabulary that may guess tokens, or None.
        speculation: how tokens are guessed ahead, or None to decode them one by one.
        kv: makes the growing KV cache; None for the one that generate prepares.
        part_tokens: most tokens of a prompt that are computed at once, of all sequences together; None: all.
    """

    def __init__(
        self,
        original: PreTrainedModel,
        traffic: Traffic | None = None,
        workload: Workload | None = None,
        draft: PreTrainedModel | None = None,
    ) -> None:
        self.original = original
        self.traffic = traffic
        self.workload = workload
        self.draft = draft
        self.modules: dict[Phase, PreTrainedModel] = dict.fromkeys(PHASES, original)
        self.transforms: tuple[Transform, ...] = ()
        self.threads: dict[Phase, int] = {}
        self.caches: CachePool | None = None
        self.loop: Loop | None = None
        self.step: DecodeSteps | None = None
        self.prompts: PromptGraphs | None = None
        self.speculation: SpeculationSetup | None = None
        self.kv: KvCache | None = None
        self.part_tokens: int | None = None
        self._editable: set[int] = set()  # ids of the modules that this variant made itself
        self._front: PreTrainedModel | None = None

    @property
    def slot_dtype(self) -> torch.dtype | None:
        """The dtype of keys and values in slots; None: the prompt's, or there are no slots."""
        return self.caches.dtype if self.caches is not None else None

    def with_transform(self, transform: Transform) -> Variant:
        """Make a new variant: this one plus `transform`, with all transforms in stage order.

        Raises:
            TransformError: the transform refuses.
        """
        return self.with_transforms((transform,))

    def with_transforms(self, transforms: Iterable[Transform]) -> Variant:
        """Make a new variant: this one plus `transforms`, with all transforms in stage order.

        Raises:
            TransformError: one of them refuses.
        """
        variant, added = self, sorted(transforms, key=lambda t: t.stage)
        if added and any(done.stage > added[0].stage for done in self.transforms):
            variant = Variant(self.original, self.traffic, self.workload, self.draft)  # what is there is made anew once
            added = sorted((*self.transforms, *added), key=lambda t: t.stage)
        if added:
            variant = variant.copy()
        for transform in added:
            variant.add(transform)
        return variant

    def add(self, transform: Transform) -> None:
        """Apply a transform to this variant itself, a `copy` that nothing runs yet. Its twins are edited further.

        Args:
            transform: of no earlier stage than those that are there.

        Raises:
            TransformError: the transform refuses, and this variant is of no use any more.
        """
        if (reason := self.state.obstacle()) is not None:
            raise TransformError(reason)
        if (reason := divided(transform, self.original)) is not None:
            raise TransformError(reason)
        with sharding.alone(self.original):
            transform.apply(self)
        if self.kv is not None and self.caches is not None:
            raise TransformError(f"the KV cache is {self.kv}; slots and what decodes over them are another kind")
        self.transforms = (*self.transforms, transform)
        self._front = None  # it was made of the modules before

    def copy(self) -> Variant:
        """Make a variant like this one, for `add`. It edits twins of its own."""
        other = Variant(self.original, self.traffic, self.workload, self.draft)
        other.modules = dict(self.modules)
        other.transforms = self.transforms
        other.threads = dict(self.threads)
        other.caches = self.caches
        other.loop = self.loop
        other.step = self.step
        other.prompts = self.prompts
        other.speculation = self.speculation
        other.kv = self.kv
        other.part_tokens = self.part_tokens
        return other

    def edit(self, phase: Literal["prefill", "decode", "both"]) -> tuple[PreTrainedModel, ...]:
        """The modules that a transform may edit for `phase`: twins made on demand, one twin if both phases share it."""
        phases = PHASES if phase == "both" else (phase,)
        stateful.of(self.original)  # finds the stateful modules, which twins share
        twins: dict[int, PreTrainedModel] = {}
        for p in phases:
            module = self.modules[p]
            shared_outside = any(self.modules[q] is module for q in PHASES if q not in phases)
            if id(module) in self._editable and not shared_outside:
                twins[id(module)] = module
            elif id(module) not in twins:
                twin = fork(module)
                self._editable.add(id(twin))
                twins[id(module)] = twin
            self.modules[p] = twins[id(module)]
            twins[id(self.modules[p])] = self.modules[p]
        return tuple({id(self.modules[p]): self.modules[p] for p in phases}.values())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Enclose a measured call: one step between a wrapped model's live requests, which leaves no state behind."""
        with nullcontext() if self.traffic is None else self.traffic.step(), self.state.kept():
            yield

    def example(self, batch: int) -> Any:
        """Keys and values of one token, [B, Hk, 1, D] per layer: the shapes for which a step is prepared."""
        model: Any = self.original
        prompt = seam.growing_cache()
        with self.turn() if self.state.modules else nullcontext(), torch.no_grad():
            token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
            model(token, **seam.over(model, prompt))
        return prompt

    @property
    def state(self) -> stateful.ForwardState:
        """The state that the model's own forward writes."""
        return stateful.of(self.original)

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest context to expect, prompt and answer together."""
        if self.workload is None:
            return DEFAULT_CONTEXT
        return max(map(len, self.workload.prompts)) + self.workload.new_tokens

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self.workload.batch_sizes if self.workload else (1,)

    @contextmanager
    def running(self, phase: Phase) -> Iterator[PreTrainedModel]:
        """Enter the context in which the phase's module runs. Everything that it changes is restored at the end.

        Raises:
            VariantError: the body raised an error other than autotune's own. So the module's failures differ from
                those of the caller's callbacks.
        """
        threads = self.threads.get(phase)
        try:
            with nullcontext() if threads is None else intraop.computing_with(threads):
                yield self.modules[phase]
        except AutotuneError:  # a refusal, or the failure of an inner phase; its type is right already
            raise
        except Exception as error:
            outside.pass_on(error)
            raise VariantError(f"{phase} failed: {type(error).__name__}: {error}") from error

    @contextmanager
    def preparing(self, batch: int) -> Iterator[None]:
        """Enclose the preparation of what decoding needs.

        Raises:
            UnreadyError: the body raised an error, and the device is not dead.
        """
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:
            outside.pass_on(error)
            raise UnreadyError(f"a batch of {batch} cannot be decoded: {type(error).__name__}: {error}") from error

    def unsupported(self, call: seam.Sampling) -> str | None:
        """Why this variant cannot serve a call of generate's loop, or None."""
        if not self.transforms:
            return None
        if reason := call.unusual():
            return reason
        if self.loop is not None and call.starts_over():
            return "a length at which the model reads everything before it anew"
        return None if self.caches is None else self.caches.unsupported(call.settings)

    def sample(self, call: seam.Sampling) -> Any:
        """Serve one call of generate's loop, on all ranks; `unsupported` must have said None."""
        leader = self._leader
        return self._serve(call) if leader is None else leader.sample(self, call)

    @property
    def _leader(self) -> Leading | None:
        """Has all ranks run this variant's calls, if this rank tunes a sharded model."""
        return LEADER.get() if sharding.ranks(self.original) > 1 else None

    def _serve(self, call: seam.Sampling) -> Any:
        if not self.transforms:
            return call.original()
        with self.device.guard():
            if self.loop is not None:
                return self.loop(self, call)
            return call.run_on(self.front)

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve one direct forward call without a cache from the caller, on all ranks."""
        leader = self._leader
        return self._serve_forward(model, args, kwargs) if leader is None else leader.forward(self, model, args, kwargs)

    def _serve_forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not serves_forward(args, kwargs):
            return seam.bare_class(model).forward(model, *args, **kwargs)
        with self.device.guard(), self.running("prefill") as module:
            return module(*args, **kwargs)

    @property
    def pause(self) -> Pause | None:
        """Pauses what several callers share while its context is held; None if each is served by itself."""
        return getattr(self.loop, "pause", None)

    @property
    def batching(self) -> str:
        """What callers' sequences are decoded together now, in a sentence; empty if each is served by itself."""
        summary: Callable[[], str] = getattr(self.loop, "summary", str)
        return summary()

    @property
    def load(self) -> EngineLoad:
        """What decodes callers' sequences together has to do and has done; nothing if each is served by itself."""
        load: EngineLoad = getattr(self.loop, "load", EngineLoad())
        return load

    @property
    def device(self) -> Device:
        """The device of the model's first weights."""
        return devices.of(self.original)

    @property
    def front(self) -> PreTrainedModel:
        """A model for transformers' own loop; its forward calls the module of the phase."""
        if self._front is None:
            stateful.of(self.original)
            front = fork(self.modules["decode"])
            front.__dict__.pop("forward", None)  # an instance's forward would hide the route
            self._front = route.routed(front, _PhaseSwitch(self))
        return self._front


class _Quiet:
    """Base of the internal routers, which count and report nothing."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def other_loop(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()


class _PhaseSwitch(_Quiet):
    """Router of `Variant.front`: one token after a filled cache is decode, everything else is prefill."""

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.variant.running("decode" if seam.is_decoding(kwargs) else "prefill") as module:
            return module(*args, **kwargs)

    def sample(self, call: seam.Sampling) -> Any:
        return call.original()


class _Measured(_Quiet):
    """Router of `serving`: runs the variant, with each call as one step between live requests."""

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.variant.turn():
            return self.variant.forward(model, args, kwargs)

    def sample(self, call: seam.Sampling) -> Any:
        if reason := self.variant.unsupported(call):
            raise MeasurementError(f"this variant cannot serve the measured call: {reason}")
        with self.variant.turn():
            return self.variant.sample(call)


def divided(transform: Transform, model: PreTrainedModel) -> str | None:
    """Why a transform does not work on the parts of a model that ranks hold, or None."""
    return None if transform.sharded else sharding.reason(model)


def serves_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the prefill module may serve a direct forward call: inference on ids, without unusual arguments."""
    plain = {
        "input_ids",
        "attention_mask",
        "position_ids",
        "use_cache",
        "logits_to_keep",
        "return_dict",
        "labels",
    }
    asked = {k for k, v in kwargs.items() if v is not None}
    return len(args) <= 1 and asked <= plain and not torch.is_grad_enabled()


def build(original: PreTrainedModel, transforms: Iterable[Transform]) -> Variant:
    """Build the variant that a plan's transforms make from an unrouted model.

    Raises:
        TransformError: one of them refuses.
    """
    return Variant(original).with_transforms(transforms)


def serving(variant: Variant) -> PreTrainedModel:
    """A model object whose `generate` and `forward` run `variant`, so that it is measured and judged as it serves."""
    return route.routed(variant.original, _Measured(variant))
