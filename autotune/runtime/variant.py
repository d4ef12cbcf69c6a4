"""A variant: one way to run the model, which shares every tensor with the original until a transform replaces it.

The original is never edited. `Variant.edit` gives structural copies (twins), so dropping the variant undoes everything.
"""

from __future__ import annotations

import copy
import enum
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch

from ..errors import AutotuneError, TransformError, VariantError
from ..machine import device as devices
from ..machine import intraop, outside
from ..model import seam, sharding, stateful
from ..model.twins import fork
from ..workload import PHASES, Phase, Workload
from .batching.load import EngineLoad
from .phase_switch import by_phase

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


class SharedEngine(Protocol):
    """What a variant knows of the engine that decodes the sequences of several callers together."""

    def alone(self) -> AbstractContextManager[None]:
        """Enclose a call that the engine does not take; no step runs meanwhile."""

    def remember(self, prompts: bool) -> None:
        """Keep prompts for later ones that begin alike, or forget them and compute every prompt."""

    def summary(self) -> str:
        """What is decoded together now, in a sentence."""

    @property
    def load(self) -> EngineLoad:
        """What it has to do now, and what it has done so far."""


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
    sets: ClassVar[str] = ""  # what of a phase it sets, in place of what an earlier one set that names the same

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

    def replaces(self, earlier: Transform) -> bool:
        """Whether nothing is left of an earlier transform once this one is applied."""
        return bool(self.sets) and self.sets == earlier.sets and {*earlier.phases} <= {*self.phases}

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
        engine: decodes the sequences of several callers together; None if each call is served by itself.
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
        self.engine: SharedEngine | None = None
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
            variant = self.bare()  # what is there is made anew once
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
        if reason := self.state.obstacle() or divided(transform, self.original):
            raise TransformError(reason)
        with sharding.alone(self.original):
            transform.apply(self)
        if self.kv is not None and self.caches is not None:
            raise TransformError(f"the KV cache is {self.kv}; slots and what decodes over them are another kind")
        left = (each for each in self.transforms if not transform.replaces(each))
        self.transforms = (*left, transform)
        self._front = None  # it was made of the modules before

    def bare(self) -> Variant:
        """Make a variant for the same model and workload, without transforms."""
        return Variant(self.original, self.traffic, self.workload, self.draft)

    def copy(self) -> Variant:
        """Make a variant of the same modules and settings, for `add`: it edits twins of its own."""
        other = copy.copy(self)
        other.modules, other.threads = dict(self.modules), dict(self.threads)
        other._editable, other._front = set(), None
        return other

    def edit(self, phase: Literal["prefill", "decode", "both"]) -> tuple[PreTrainedModel, ...]:
        """The modules that a transform may edit for `phase`: twins made on demand, one twin if both phases share it."""
        phases = PHASES if phase == "both" else (phase,)
        stateful.of(self.original)  # finds the stateful modules, which twins share
        for module in {id(self.modules[p]): self.modules[p] for p in phases}.values():
            shared_outside = any(self.modules[q] is module for q in PHASES if q not in phases)
            if id(module) not in self._editable or shared_outside:
                # the twin of a module that is exchanged during a live request would keep the exchange for good
                with self.turn() if seam.exchanges_experts(module) else nullcontext():
                    twin = fork(module)
                self._editable.add(id(twin))
                self.modules |= {p: twin for p in phases if self.modules[p] is module}
        return tuple({id(self.modules[p]): self.modules[p] for p in phases}.values())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Enclose a measured call: one step between a wrapped model's live requests, which leaves no state behind."""
        with nullcontext() if self.traffic is None else self.traffic.step(), self.state.kept():
            yield

    @property
    def clock(self) -> Callable[[], float]:
        """A monotonic clock, seconds, that stops while measured steps wait for their turn."""
        return time.perf_counter if self.traffic is None else self.traffic.clock

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

    @property
    def pause(self) -> Pause | None:
        """Pauses what several callers share while its context is held; None if each is served by itself."""
        return None if self.engine is None else self.engine.alone

    @property
    def batching(self) -> str:
        """What callers' sequences are decoded together now, in a sentence; empty if each is served by itself."""
        return "" if self.engine is None else self.engine.summary()

    @property
    def load(self) -> EngineLoad:
        """What the engine has to do and has done; nothing if each call is served by itself."""
        return EngineLoad() if self.engine is None else self.engine.load

    @property
    def device(self) -> Device:
        """The device of the model's first weights."""
        return devices.of(self.original)

    @property
    def front(self) -> PreTrainedModel:
        """A model for transformers' own loop; its forward calls the module of the phase."""
        if self._front is None:
            stateful.of(self.original)
            self._front = by_phase(self.modules["decode"], lambda phase: self.running(phase))  # looked up at each call
        return self._front


def divided(transform: Transform, model: PreTrainedModel) -> str | None:
    """Why a transform does not work on the parts of a model that ranks hold, or None."""
    return None if transform.sharded else sharding.reason(model)
