"""Survey a variant: time requests, trace one, count the work, and combine the results in a profile."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import torch

from ..diagnose.costs import MemoryUse, PhaseProfile, Profile, ScalePoint
from ..diagnose.work import (
    Forward,
    activation_dtype,
    activation_size,
    attention_flops,
    cache_size,
    compute_dtype,
    count,
    query_heads_per_kv_head,
    stored_weights,
)
from ..machine import device as devices
from ..machine.peaks import uses_tf32
from ..machine.roofline import ridge
from ..model import configured
from ..runtime.dispatch import serving
from ..workload import PHASES, Phase, Workload
from .budget import Budget
from .observing import DevicePhase, observe
from .operators import device_use, share, table
from .scaling import BATCHES, STEPS, batch_scaling, context_growth, growth_s, room
from .spans import Trace
from .timing import RequestTimes, time_request
from .tracing import trace, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant

TIMING_SHARE = 0.3  # share of the budget for TTFT and TPOT samples; the rest is for operators and scaling
MAX_SAMPLES = 9  # most timed requests; with more, the median on a quiet host no longer changes
MAX_NEW_TOKENS = 32  # most tokens per timed request; the decode time per token is stable by then
TRACED_TOKENS = 6  # tokens per traced request: five decode steps, of which one is analysed


def survey(
    variant: Variant,
    workload: Workload,
    hardware: Hardware,
    *,
    budget_s: float,
    scaling: bool,
    progress: Callable[[str], None] | None,
) -> Profile:
    """Do the work of `autotune.profile.measure`; see there for the arguments."""
    budget = Budget(budget_s, progress)
    served, batch = serving(variant), workload.batch_sizes[0]
    ids = _prompts(variant, workload, batch)
    with budget.step("warm-up"):
        warm = time_request(served, ids, 3, variant.turn)
    affordable = (TIMING_SHARE * budget_s / 4 - warm.ttft_s) / warm.tpot_s
    new_tokens = max(TRACED_TOKENS, min(workload.new_tokens, MAX_NEW_TOKENS, int(affordable)))

    requests, rest_s = list[RequestTimes](), (1 - TIMING_SHARE) * budget_s
    before = right_guesses(variant)
    while not requests or (len(requests) < MAX_SAMPLES and budget.left_s() > rest_s and budget.allows(growth=1)):
        with budget.step(f"prefill and decode, sample {len(requests) + 1}"):
            requests.append(time_request(served, ids, new_tokens, variant.turn))
    passes = {"prefill": 1.0, "decode": 1 - (right_guesses(variant) - before) / (len(requests) * (new_tokens - 1))}
    with budget.step("operators"):
        traces = trace(watched(variant), ids, TRACED_TOKENS, requests=2 if budget.allows(growth=3) else 1)
    device, seen = devices.of(variant.original), dict[Phase, DevicePhase]()
    if device.asynchronous:
        with budget.step("device counters"):
            seen = observe(device, lambda tokens: time_request(served, ids, tokens), new_tokens, variant.turn)
    batches, contexts = grown(variant, workload, budget) if scaling else ((), ())

    prompt_tokens = ids.shape[1]
    samples = {"prefill": [r.ttft_s for r in requests], "decode": [r.tpot_s for r in requests]}
    shapes = {
        "prefill": Forward(batch, prompt_tokens),
        "decode": Forward(batch, 1, prompt_tokens + new_tokens // 2),  # half-way through
    }
    return Profile(
        phases={
            p: _phase(p, variant, samples[p], shapes[p], passes[p], traces[p], hardware, seen.get(p), contexts)
            for p in PHASES
        },
        batch_scaling=batches,
        context_growth=contexts,
        memory=memory_use(variant, shapes["prefill"], new_tokens),
        prompt_tokens=prompt_tokens,
        batch=batch,
        query_heads_per_kv_head=query_heads_per_kv_head(variant.original),
    )


def grown(
    variant: Variant, workload: Workload, budget: Budget
) -> tuple[tuple[ScalePoint, ...], tuple[ScalePoint, ...]]:
    """Measure how decoding grows with batch size and with context length, as far as the budget allows."""
    served, most = serving(variant), room(variant)
    ids = _prompts(variant, workload, 1)
    sizes = BATCHES if variant.step is None else workload.batch_sizes  # another batch size would compile for minutes
    batches = batch_scaling(served, ids, sizes, most, budget.part(0.5))
    return batches, context_growth(served, ids, most, budget.part(1.0))


def _prompts(variant: Variant, workload: Workload, batch: int) -> torch.Tensor:
    """Return `median_prompts` on the variant's device, cut where the context has no room for what is generated here."""
    most = (configured.context(variant.original) or sys.maxsize) - max(TRACED_TOKENS, STEPS)
    return median_prompts(workload, batch)[:, : max(1, most)].to(variant.original.device)


def median_prompts(workload: Workload, batch: int) -> torch.Tensor:
    """Return prompts of the workload's median length, [batch, P] int64. Longer prompts are cut.

    The prompts differ if there are enough, because a mixture routes them to different experts.
    """
    ordered = sorted(workload.prompts, key=len)
    length = len(ordered[len(ordered) // 2])
    fitting = [prompt[:length] for prompt in ordered if len(prompt) >= length]
    rows = list(itertools.islice(itertools.cycle(fitting), batch))
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def right_guesses(variant: Variant) -> int:
    """Count the tokens so far that were guessed right, for which no weights had to be read separately."""
    return variant.speculation.tally.right if variant.speculation is not None else 0


def memory_use(variant: Variant, prefill: Forward, new_tokens: int) -> MemoryUse:
    """Return the peak memory of one request: weights, full cache, and prefill's activations.

    Weights are the distinct storages of the original and both phases' modules. Activations are an estimate by formula
    (`activation_size`); the other two are exact.
    """
    model = variant.original
    return MemoryUse(
        weights_bytes=stored_weights(variant.original, *variant.modules.values()),  # the original stays in memory
        cache_bytes=cache_bytes(variant, prefill.batch, prefill.new + new_tokens),
        activations_bytes=activation_size(model, prefill, activation_dtype(model).itemsize),
    )


def cache_bytes(variant: Variant, batch: int, tokens: int) -> int:
    """Return the bytes of a variant's KV cache when it holds `tokens` tokens of each sequence."""
    held = variant.kv.bytes if variant.kv is not None else cache_size
    return held(variant.original, batch, tokens, _cache_dtype(variant, variant.original).itemsize)


def _cache_dtype(variant: Variant, module: PreTrainedModel) -> torch.dtype:
    """Return the dtype of keys and values in slots, or in a plain cache of a module of the variant."""
    return variant.slot_dtype or activation_dtype(module)


def _phase(
    phase: Phase,
    variant: Variant,
    samples_s: list[float],
    forward: Forward,
    passes: float,
    trace: Trace,
    hardware: Hardware,
    seen: DevicePhase | None,
    contexts: tuple[ScalePoint, ...],
) -> PhaseProfile:
    model = variant.modules[phase]
    name = compute_dtype(model)
    if name == "float32" and seen is not None and uses_tf32():
        name = "tf32"
    work = {
        group: replace(part, weight_bytes=part.weight_bytes * passes, cache_bytes=part.cache_bytes * passes)
        for group, part in count(model, forward, _cache_dtype(variant, model).itemsize).items()
    }
    found = share(trace, median(samples_s))
    return PhaseProfile(
        phase=phase,
        samples_s=tuple(samples_s),
        flops=sum(part.flops for part in work.values()),
        weight_bytes=sum(part.weight_bytes for part in work.values()),
        cache_bytes=sum(part.cache_bytes for part in work.values()),
        busy=found.busy_s / median(samples_s),
        compute_dtype=name,
        linear_s=found.linear_s,
        attention_s=found.attention_s,
        operator_count=found.operator_count,
        sync_s=found.sync_s,
        operators=table(found, work, ridge(hardware.peak_flops_per_s(name), hardware.bandwidth_bytes_per_s)),
        attention_flops=attention_flops(model, forward),
        small_s=found.small_s,
        loop_s=found.loop_s,
        matmul_count=found.matmul_count,
        around_attention_s=found.around_attention_s,
        device=device_use(trace, median(samples_s), seen.event_s, seen.counters) if seen else None,
        growth_s=growth_s(contexts, forward.past) if seen and phase == "decode" else 0.0,
        stored_bytes=stored_weights(model),
    )
