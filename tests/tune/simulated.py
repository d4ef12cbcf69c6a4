"""The search with the built-in policies over models and GPUs that are not there, on a clock that is not there, either.

Predictions, diagnoses, policies and search are the real ones. Times, bytes and qualities are made up as follows:

* the host takes 1.44 ms a layer and token until a step is captured (23 ms for 16 layers, an H100, see docs/gpu.md)
* matmuls over a format's bytes reach the share of the bandwidth in FORMATS; 40 small kernels a layer take 2 us each
* a prompt's matmuls reach 70 % of the peak of the numbers that they multiply; where an 8-bit library quantises
  activations, the host takes HOST_8_BIT_S more for each layer of a prompt
* making a format takes what the transform says of a vocabulary's layer
* capturing prefill takes 7 runs of 10 prompts
* compiling a step takes 1.1 s a layer for each length (35 s for 32 layers) and prefill 2.5 times that, quantising 2 GB
  a second, whenever a transform is applied
* an exam reads 688 tokens step by step; the original's steps are read once; a race takes 5 to 25 pairs of requests
* exams, races and confirmations end with the budget by the rules of the real bench (`Allowance`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from autotune import transforms
from autotune.diagnose.costs import DeviceUse, MemoryUse, PhaseProfile, Profile
from autotune.diagnose.diagnosis import Diagnosis, diagnose
from autotune.errors import BudgetSpentError
from autotune.machine import gpus
from autotune.machine.hardware import Hardware
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.linears import LinearTransform
from autotune.tune import compose, order, search, trying
from autotune.tune import policy as policies
from autotune.tune.allowance import Allowance
from autotune.tune.plan import Confirmation
from autotune.validate import Latency, Quality, Speedup, Verdict
from autotune.workload import PHASES, Phase, Target, Workload
from tests.models import tiny, token_prompts
from tests.tune.test_search import ScriptedProbe


def gpu(name: str, capability: str, gigabytes: int, terabytes_per_s: float, teraflops: float) -> Hardware:
    peaks = {"float32": teraflops / 16, "bfloat16": teraflops, "float16": teraflops, "int8": 1.9 * teraflops}
    if (gpus.parse(capability) or (0, 0)) >= (8, 9):
        peaks["float8_e4m3fn"] = 1.9 * teraflops
    flops = {dtype: 1e12 * peak for dtype, peak in peaks.items()}
    return Hardware("cuda", name, capability, 16, gigabytes << 30, 1e12 * terabytes_per_s, flops, "/usr/bin/g++", {})


# about 85 % of the data sheets' bandwidth, 70 % of their FLOP/s
A100, H100 = gpu("A100", "8.0", 80, 1.75, 220), gpu("H100", "9.0", 80, 2.87, 700)
RTX, L4, B200 = (
    gpu("RTX 4090", "8.9", 24, 0.9, 150),
    gpu("L4", "8.9", 24, 0.26, 85),
    gpu("B200", "10.0", 180, 6.8, 1500),
)
LAYERS = {1: 16, 8: 32, 32: 64}  # by billions of parameters
HEADS = {1: 2**28, 8: 2**29, 32: 2**29 + 2**28}  # weights of the largest layer
HOST_S, HOST_8_BIT_S, SMALL_S, COMPILE_S = 1.44e-3, 0.4e-3, 80e-6, 1.1  # a layer
EXAM, BRIEF_EXAM, FAILED = 688, 72, 150  # tokens that an exam reads step by step, a brief one, and one that fails early
DYNAMIC = {"float8_dynamic": "float8_e4m3fn", "int8_dynamic": "int8"}  # formats that a prompt's matmuls multiply in
# bytes of a weight, share of the bandwidth that its matmul reaches, mean KLD in nats
FORMATS: dict[str, tuple[float, float, float]] = {
    "": (2.0, 0.80, 0.0),
    "int4_weight_only": (0.625, 0.55, 0.02),
    "int4_hqq": (0.625, 0.55, 0.019),
    "nf4": (0.56, 0.40, 0.02),
    "triton_weights 8": (1.0625, 0.75, 0.001),
    "triton_weights 4": (0.625, 0.55, 0.019),
    "float8_weight_only": (1.0, 0.70, 0.004),
    "float8_dynamic": (1.0, 0.60, 0.01),
    "int8_weight_only": (1.0, 0.70, 0.002),
    "int8": (1.0, 0.20, 0.003),
    "int8_dynamic": (1.0, 0.50, 0.01),
}
LIMITS = {"lossless": 5e-4, "strict": 0.005, "relaxed": 0.05}
ATTENTION_S = 12e-6  # a layer, over a prompt or 1024 slots
# What SDPA takes besides over slots: two launches, and bytes of keys and values repeated for four query heads each.
REPEATING_S, REPEATED = 6e-6, 36e6
ATTENTIONS = {"attention", "slot_attention"}
ABSENT = ("flash_attention", "kernels-community", "flex_attention", "draft=model")


@dataclass(frozen=True)
class StandIn(Transform):
    """A transform of which only its predictions and refusals are real."""

    real: Transform = field(default_factory=LeanLoop)

    name: ClassVar[str] = "stand-in"
    summary: ClassVar[str] = "for tests"
    world: ClassVar[World]

    def __getattribute__(self, name: str) -> Any:
        if name in ("stage", "lossless", "predict", "foreign"):
            return getattr(object.__getattribute__(self, "real"), name)
        return object.__getattribute__(self, name)

    @property
    def format(self) -> str:
        """Key into FORMATS."""
        real: Any = self.real
        found = str(getattr(real, "scheme", f"{real.name} {getattr(real, 'bits', '')}"))
        return found if found in FORMATS else ""

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        named = {t.real.name for t in applied(variant) if set(t.phases) & set(self.phases)}
        if any(each in str(self.real) for each in ABSENT):
            return "not installed"
        if self.real.name == "linear_dtype":
            return self.real.unavailable(variant, hardware)
        if self.format and any(t.format and set(t.phases) & set(self.phases) for t in applied(variant)):
            return "exchanged already"
        if self.real.name == "capture_prefill" and "cuda_graph" not in {t.real.name for t in applied(variant)}:
            return "there are no slots"
        if self.real.name in named or (self.real.name in ("static_cache", "lean_loop") and "cuda_graph" in named):
            return "there already"
        if "reduce-overhead" in str(self.real) and "cuda_graph" in named:
            return "captured already"
        if self.real.name in ATTENTIONS and any(name in ATTENTIONS for name in named):
            return "there already"
        return None

    def rehearsed(self) -> None:
        return None

    def extra_bytes(self, variant: Variant) -> float:
        real: Any = self.real
        head = nn.Linear(4096, HEADS[self.world.billions] // 4096, device="meta", dtype=torch.bfloat16)
        working = real.working_bytes(head) if self.format and isinstance(real, LinearTransform) else 0.0
        return self.world.copied(self) + working

    def apply(self, variant: Variant) -> None:
        self.world.now += self.world.making_s(self, variant)

    def took_effect(self, variant: Variant) -> str | None:
        return None


def applied(variant: Variant) -> list[StandIn]:
    return [transform for transform in variant.transforms if isinstance(transform, StandIn)]


@dataclass
class World:
    """A machine, a model and a clock. It is the search's bench."""

    hardware: Hardware
    billions: int
    tier: str = "strict"
    now: float = 0.0
    seen: set[str] = field(default_factory=set)

    def clock(self) -> float:
        return self.now

    def once(self, what: str, seconds: float) -> None:
        if what not in self.seen:
            self.seen.add(what)
            self.now += seconds

    def __post_init__(self) -> None:
        self.allowance = Allowance(0.0, lambda _: None, self.clock)

    @property
    def stored(self) -> float:
        return 2e9 * self.billions

    def copied(self, transform: StandIn) -> float:
        """Bytes that a transform adds."""
        if transform.format:
            return FORMATS[transform.format][0] * 1e9 * self.billions
        return 0.57 * self.stored if transform.real.name == "merged_linears" else 0.0

    def plan_bytes(self, variant: Variant) -> float:
        """Bytes of a variant's own weights. Narrow ones replace merged ones."""
        narrow = any(t.format and "decode" in t.phases for t in applied(variant))
        return sum(self.copied(t) for t in applied(variant) if t.format or not narrow)

    def names(self, variant: Variant) -> set[str]:
        return {t.real.name for t in applied(variant)}

    def format(self, variant: Variant, phase: Phase) -> str:
        found = [t.format for t in applied(variant) if t.format and phase in t.phases]
        return found[-1] if found else ""

    def phase(self, phase: Phase, variant: Variant) -> PhaseProfile:
        names, layers = self.names(variant), LAYERS[self.billions]
        size, share, _ = FORMATS[self.format(variant, phase)]
        weights = size * 1e9 * self.billions
        tokens = 1 if phase == "decode" else 512
        flops = 2e9 * self.billions * tokens
        kept = 0.95 if "merged_linears" in names else 1.0
        linear_s = kept * weights / (share * self.hardware.bandwidth_bytes_per_s)
        dynamic = DYNAMIC.get(self.format(variant, phase))
        if phase == "prefill":
            linear_s = max(linear_s, flops / (0.7 * self.hardware.flops_per_s[dynamic or "bfloat16"]))
        compiled = "compile_step" in names if phase == "decode" else "compile_prefill" in names
        small_s = layers * SMALL_S * (0.4 if compiled else 1.0)
        own = any(t.real.name in ATTENTIONS and phase in t.phases for t in applied(variant))
        masked_s = 0.0 if own or phase == "prefill" else REPEATING_S + REPEATED / self.hardware.bandwidth_bytes_per_s
        attention_s = layers * (ATTENTION_S + masked_s)
        busy_s = linear_s + small_s + attention_s
        captured = ("cuda_graph" if phase == "decode" else "capture_prefill") in names
        host_s = 0.0 if captured else layers * HOST_S * (0.7 if names & {"lean_loop", "static_cache"} else 1.0)
        host_s += layers * HOST_8_BIT_S if dynamic and phase == "prefill" else 0.0
        seconds = max(host_s * (0.4 if compiled else 1.0), 1.02 * busy_s)
        idle_s, kernels = max(0.0, seconds - busy_s), 45 * layers
        device = DeviceUse(
            busy_s, 1 if captured else kernels, kernels, idle_s, idle_s, 0.9, 0.0, graph_launches=int(captured)
        )
        return PhaseProfile(
            phase=phase,
            samples_s=(seconds,),
            flops=flops,
            weight_bytes=weights,
            cache_bytes=4e3 * layers * 600,
            busy=busy_s / seconds,
            compute_dtype="bfloat16",
            linear_s=linear_s,
            attention_s=attention_s,
            operator_count=kernels,
            sync_s=0.0,
            operators=(),
            attention_flops=0.01 * flops,
            small_s=small_s,
            around_attention_s=0.1 * small_s,
            device=device,
            stored_bytes=weights,
        )

    def seconds(self, phase: Phase, variant: Variant) -> float:
        return self.phase(phase, variant).seconds

    def request_s(self, variant: Variant) -> float:
        return self.seconds("prefill", variant) + 31 * self.seconds("decode", variant)

    # The search's bench

    def profile(self, variant: Variant) -> Profile:
        self.now += 8 if variant.transforms else 24
        if not variant.transforms:
            self.allowance.request_s = self.request_s(variant)
        memory = MemoryUse(int(self.stored + self.plan_bytes(variant)), 10**8, 2 * 10**8)
        return Profile({p: self.phase(p, variant) for p in PHASES}, (), (), memory, 512, 1)

    def diagnose(self, profile: Profile) -> Mapping[Phase, Diagnosis]:
        return {p: diagnose(profile.phases[p], self.hardware, profile.memory) for p in PHASES}

    def memory_ratio(self, variant: Variant) -> float:
        return 1 + self.plan_bytes(variant) / self.stored

    def begin(self, budget_s: float, deadline: float) -> None:
        self.allowance.begin(budget_s, deadline)

    def first_speedup(self, incumbent: Variant, candidate: Variant, phase: Phase) -> float:
        self.now += 2 * sum(map(self.request_s, (incumbent, candidate))) / 3
        return self.seconds(phase, incumbent) / self.seconds(phase, candidate)

    def making_s(self, made: StandIn, variant: Variant) -> float:
        """Seconds to apply a transform: copies of weights once, graphs and compiled steps whenever they are made."""
        layers = LAYERS[self.billions]
        match made.real.name:
            case "compile_step":
                return COMPILE_S * layers
            case "cuda_graph":
                return 4.0 + (COMPILE_S * layers if "compile_step" in self.names(variant) else 0.0)
            case "compile_prefill":
                return 2.5 * COMPILE_S * layers
            case "capture_prefill":
                return 7 * 10 * HOST_S * layers
        if not self.copied(made) or str(made) in self.seen:
            return 0.0
        self.seen.add(str(made))
        return self.stored / 2e9

    def risk(self, *_: Any) -> None: ...

    def reading(self, seconds: float) -> None:
        """Let the time of an exam pass, or as much of it as the budget allows."""
        allowance = self.allowance
        end = allowance.deadline + max(0.0, allowance.grace_s - allowance.race_s)
        if self.now + seconds > end:
            self.now = max(self.now, end)
            raise BudgetSpentError(f"the budget of {allowance.budget_s:.0f} s was spent with an exam under way")
        self.now += seconds

    def exam(self, variant: Variant, tier: str, references: str, most: int = EXAM) -> Quality:
        original = Variant(variant.original)
        if references not in self.seen:
            self.seen.add(references)
            self.reading(8 + 40 * self.seconds("prefill", original))
        if tier == "lossless" and "steps" not in self.seen:
            self.seen.add("steps")
            self.reading(EXAM * self.seconds("decode", original))
        loss = max(FORMATS[self.format(variant, phase)][2] for phase in PHASES)
        passes = loss <= LIMITS[tier]
        tokens = most if passes else min(most, FAILED)
        self.reading(tokens * self.seconds("decode", variant) + 16 * self.seconds("prefill", variant))
        return Quality(tier, Verdict.PASS if passes else Verdict.FAIL, f"mean KLD {loss}", mean_kld=loss)

    def judge(self, variant: Variant, tier: str) -> Quality:
        with self.allowance.timed("judgement"):
            return self.exam(variant, tier, "references")

    def probe(self, incumbent: Variant, transform: Any, tier: str) -> Any:
        self.once("references", 8 + 40 * self.seconds("prefill", incumbent))
        self.now += self.stored / 2e9 + 16 * self.seconds("prefill", incumbent)
        return ScriptedProbe(20 if FORMATS[transform.format][2] > LIMITS[tier] else 0)

    def timed(self, incumbent: Variant, candidate: Variant, target: Target, kept_s: float, most: int = 25) -> Latency:
        took_s = [self.request_s(v) if target == "both" else self.seconds(target, v) for v in (incumbent, candidate)]
        ratio = took_s[0] / took_s[1]
        pairs = min(most, 5 if not 0.9 < ratio < 1.1 else 25)
        whole_s = (4 + pairs) * (self.request_s(incumbent) + self.request_s(candidate))
        self.now += min(whole_s, self.allowance.longest_race_s(kept_s))
        gain = Speedup(ratio, ratio - 0.01, ratio + 0.01, pairs)
        verdict = Verdict.PASS if ratio >= 1.04 else Verdict.FAIL
        return Latency(verdict, f"{ratio:.2f}x", gain, gain, gain, 0.01)

    def race(self, incumbent: Variant, candidate: Variant, target: Target) -> Latency:
        with self.allowance.timed("race"):
            return self.timed(incumbent, candidate, target, self.race_s)

    def confirm(self, variant: Variant, *, brief: bool = True) -> Confirmation:
        original = Variant(variant.original)
        if brief and self.allowance.shortage is not None:
            self.now += BRIEF_EXAM * self.seconds("decode", variant) + 8 * self.seconds("prefill", variant)
            quality = Quality(self.tier, Verdict.PASS, "in brief")
            return Confirmation(None, quality, self.timed(original, variant, "both", 0.0, 8), brief=True)
        quality = self.exam(variant, self.tier, "held-out references")
        return Confirmation(None, quality, self.timed(original, variant, "both", 0.0))

    @property
    def race_s(self) -> float:
        return self.allowance.race_s

    def least_s(self, profile: Profile) -> float:
        return 2 * (EXAM * profile.phases["decode"].seconds + self.race_s)

    def free_bytes(self) -> float:
        return 0.95 * self.hardware.memory_bytes - self.stored - 1e9

    def describe_error(self, error: Exception) -> str:
        raise error

    def free_memory(self) -> None: ...


def tuned(
    name: str, world: World, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, budget_s: float | None = None
) -> search.Found:
    """Search with a policy.

    Args:
        budget_s: exact; None: the policy's own.
    """
    make, policy = transforms.make, policies.load(name)
    policy = policy if budget_s is None else replace(policy, budget_s=budget_s)

    def stand_in(transform: str, params: Mapping[str, Any], phase: Any = "both") -> Transform:
        real = make(transform, params, phase)
        return StandIn(phase=real.phase, real=real)

    world.tier = policy.tier
    monkeypatch.setattr(StandIn, "world", world, raising=False)
    monkeypatch.setattr(transforms, "make", stand_in)
    for module in (order, compose, trying):
        monkeypatch.setattr(module, "is_foreign", lambda transform: transform.foreign)
    monkeypatch.setattr(search, "parameter_count", lambda *_: 10**9 * world.billions)
    work = Workload(tuple(map(tuple, token_prompts(4))), new_tokens=32)
    original = Variant(tiny("llama").to(dtype), None, work)
    return search.search(original, policy, world.hardware, world, notify=lambda _: None, clock=world.clock)
