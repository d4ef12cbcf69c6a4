"""What the user could change, with the gain that the roofline predicts: pure functions over the findings.

Every prediction is for the variant that serves now (the profile after tuning, if there is one) and for one change at a
time. It follows from measured times, counted bytes and FLOPs, and for other machines from data sheets. Advice is left
out if something that it needs was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..diagnose.ceilings import attainable_bandwidth, attainable_peak
from ..diagnose.diagnosis import FULL, UNITS, overhead_s
from ..machine.roofline import floor_s
from ..profile.scaling import growth_s
from ..report import numbers as n
from ..workload import METRIC_OF
from .machines import MIN_MACHINE_GAIN, other_machines
from .served import Advice, ServingVariant, ms

if TYPE_CHECKING:
    from ..diagnose.costs import ScalePoint
    from .findings import Findings

MIN_GAIN = 1.05  # least speed-up that counts; two profiles of the same model differ by up to 5 %
NEAR_BEST = 0.9  # share of the best throughput at which a batch is large enough; beyond it, mostly latency grows
CLEARLY = 2.0  # ratio of the compute and memory floors from which the longer one alone decides
SHARED = 4  # query heads per key and value head of common models with grouped-query attention (Llama 3 8B: 32 / 8)


def advise(findings: Findings) -> tuple[Advice, ...]:
    """All advice that the findings support; advice with a gain comes first."""
    diagnoses = findings.diagnoses_after if findings.after is not None else findings.diagnoses_before
    served = ServingVariant(
        findings.after or findings.before,
        findings.hardware,
        {phase: diagnosis.bottleneck for phase, diagnosis in diagnoses.items()},
        {phase: found.operator_count for phase, found in findings.before.phases.items()},
    )
    pieces = (larger_batch, more_memory, shorter_prompts, shorter_context, grouped_queries, other_machines, no_use)
    found = [advice for piece in pieces for advice in piece(served)]
    return tuple(sorted(found, key=lambda advice: all(gain is None for gain in advice.speedups.values())))


def larger_batch(served: ServingVariant) -> Iterator[Advice]:
    """Decode more sequences at once, if they fit in memory; predicted from the measured growth."""
    base, larger = _batches(served)
    gains = {p: served.throughput(p) / served.throughput(base) for p in larger if base and p.batch <= served.room()}
    if base is None or not gains:
        return
    best = max(gains.values())
    chosen = next(point for point, gain in gains.items() if gain >= NEAR_BEST * best)
    gain = gains[chosen]
    slower = n.ratio(chosen.batch / base.batch / gain)
    yield Advice(
        f"{chosen.batch} sequences at once in decode instead of {base.batch}",
        {"throughput": _worth(gain)},
        f"{_growth(served, base, chosen)}: {n.ratio(gain)} the tokens per second, {slower} the time per token",
        "as many requests come at a time",
    )


def more_memory(served: ServingVariant) -> Iterator[Advice]:
    """Add memory for more sequences than fit now; predicted from the measured growth."""
    memory, each, room = served.profile.memory, served.sequence_bytes(), served.room()
    base, larger = _batches(served)
    most = max([served.profile.batch, *(point.batch for point in larger)])
    if not each:
        return
    holds = (
        f"of {n.scaled(served.hardware.memory_bytes, 'B')}, weights take {n.scaled(memory.weights_bytes, 'B')}, and a "
        f"sequence {n.scaled(each, 'B')} of cache and activations: {n.count(room)} fit into {n.percent(FULL)} of it"
    )
    if room >= most:
        more = "measured" if larger else "served"
        yield Advice(
            "More memory for the KV cache", {"throughput": None}, f"{holds}, and no more than {most} were {more}"
        )
    elif base is not None and base.batch <= room:
        fitting = max((p for p in (base, *larger) if p.batch <= room), key=served.throughput)
        beyond = max((p for p in larger if p.batch > room), key=served.throughput)
        yield Advice(
            f"{n.scaled((memory.weights_bytes + beyond.batch * each) / FULL, 'B')} of memory for the KV cache",
            {"throughput": _worth(served.throughput(beyond) / served.throughput(fitting))},
            f"{holds}; {_growth(served, fitting, beyond)}",
            f"{beyond.batch} requests come at a time",
        )


def shorter_prompts(served: ServingVariant) -> Iterator[Advice]:
    """Halve the prompt. Matmuls shrink in proportion until reading the weights limits them, attention quadratically."""
    prefill, tokens = served.profile.phases.get("prefill"), served.profile.prompt_tokens
    if prefill is None or tokens < 2 or not prefill.linear_s:
        return
    peak, bandwidth = attainable_peak(prefill, served.hardware), attainable_bandwidth(prefill, served.hardware)
    part = tokens // 2 / tokens

    def shrunk_s(seconds: float, flops: tuple[float, float], moved: tuple[float, float]) -> float:
        """Scale `seconds` as the floor shrinks; `flops` and `moved` are pairs of the values now and then."""
        now_s, then_s = (floor_s(*work, peak, bandwidth) for work in zip(flops, moved, strict=True))
        return seconds * then_s / now_s if now_s else seconds

    linear, attention, weights = prefill.flops - prefill.attention_flops, prefill.attention_flops, prefill.weight_bytes
    linear_s = shrunk_s(prefill.linear_s, (linear, part * linear), (weights, weights))
    cache = (prefill.cache_bytes, part * prefill.cache_bytes)
    attention_s = shrunk_s(prefill.attention_s, (attention, part**2 * attention), cache)
    then_s = max(0.0, prefill.seconds - prefill.linear_s - prefill.attention_s) + linear_s + attention_s
    also = f", attention's from {ms(prefill.attention_s)} to {ms(attention_s)}" if prefill.attention_s else ""
    yield _judged(
        f"Prompts of {tokens // 2} tokens instead of {tokens}",
        "ttft",
        prefill.seconds / then_s,
        f"the roofline of matmuls over {n.scaled(weights, 'B')} of weights shrinks their time from "
        f"{ms(prefill.linear_s)} to {ms(linear_s)}{also}, of {ms(prefill.seconds)} {UNITS['prefill']}",
        "both keep their share of it, and that all other time stays",
    )


def shorter_context(served: ServingVariant) -> Iterator[Advice]:
    """Halve the context in decode, and so the part of a token's time that grows with the context."""
    if found := _context_s(served):
        seconds, context_s, source = found
        change = "Half the context in decode, by shorter prompts or a sliding window"
        yield _judged(change, "tpot", seconds / (seconds - context_s / 2), source, "half of that goes with it")


def grouped_queries(served: ServingVariant) -> Iterator[Advice]:
    """Share the cache among more query heads. No advice for models that already share it as much."""
    heads, found = served.profile.query_heads_per_kv_head, _context_s(served)
    if heads is None or heads >= SHARED or found is None:
        return
    seconds, context_s, source = found
    yield _judged(
        f"A model with grouped-query attention, {SHARED} query heads per key and value head instead of {heads:.3g}",
        "tpot",
        seconds / (seconds - context_s * (1 - heads / SHARED)),
        source,
        f"all of that is reading the cache, of which {n.percent(heads / SHARED)} would be left",
    )


def no_use(served: ServingVariant) -> Iterator[Advice]:
    """Name common changes that would not help a phase with this bottleneck."""
    for phase, found in served.profile.phases.items():
        peak, bandwidth = attainable_peak(found, served.hardware), attainable_bandwidth(found, served.hardware)
        compute_s, move_s, spent_s = found.flops / peak, found.moved_bytes / bandwidth, overhead_s(found)
        rate = f"{n.scaled(peak, 'FLOP/s')} in {found.compute_dtype}"
        computing = f"its {n.scaled(found.flops, 'FLOP')} {UNITS[phase]} taking {ms(compute_s)} at {rate}"
        moving = f"its {n.scaled(found.moved_bytes, 'B')} taking {ms(move_s)} at {n.scaled(bandwidth, 'B/s')}"
        match served.bottlenecks.get(phase):
            case "compute" if compute_s >= CLEARLY * move_s:
                change = f"Quantised weights, still multiplied in {found.compute_dtype}, or faster memory"
                because = f"it is compute-bound, {computing}, {moving}"
            case "memory" | "kv-cache" as bound if move_s >= CLEARLY * compute_s:
                change, because = "More FLOP/s at the same bandwidth", f"it is {bound}-bound, {moving}, {computing}"
            case "overhead" if found.seconds < MIN_MACHINE_GAIN * spent_s:
                change = "Faster memory or more FLOP/s"
                spent = f"{ms(spent_s)} of {ms(found.seconds)} {UNITS[phase]} pass between operators and in small ones"
                because = (
                    f"{spent}; with no time for anything else it would be {n.ratio(found.seconds / spent_s)} as fast"
                )
            case _:
                continue
        yield Advice(f"{change}, for {phase}", {METRIC_OF[phase]: None}, because)


def _batches(served: ServingVariant) -> tuple[ScalePoint | None, list[ScalePoint]]:
    """The measured point of the served batch size, and the points of larger ones, in ascending order."""
    points = {point.batch: point for point in served.profile.batch_scaling}
    base = points.get(served.profile.batch)
    if base is None or "decode" not in served.profile.phases:
        return None, []
    return base, [points[batch] for batch in sorted(points) if batch > base.batch]


def _growth(served: ServingVariant, base: ScalePoint, point: ScalePoint) -> str:
    """Describe the two measured points that a prediction is based on."""
    measured = (
        f"a step of {point.batch} sequences takes {ms(point.seconds_per_step)}, one of {base.batch} "
        f"{ms(base.seconds_per_step)}, measured at a context of {point.context} tokens"
    )
    missing, seconds = served.rest_of_cache(point)
    more = f" (and {ms(seconds)} for each sequence's {n.scaled(missing, 'B')} of cache beyond that)"
    return measured + more if missing else measured


def _context_s(served: ServingVariant) -> tuple[float, float, str] | None:
    """Seconds per token, the part of them that the context costs, and the source; None if it was not measured."""
    decode, points = served.profile.phases.get("decode"), served.profile.context_growth
    if decode is None:
        return None
    if len(points) > 1 and served.profile.batch == points[0].batch:
        tokens = served.profile.prompt_tokens
        grown_s = min(growth_s(points, tokens), decode.seconds)
        at = f"a prompt of {tokens} tokens costs {ms(grown_s)} of {ms(decode.seconds)} a token"
        source = f"the growth measured from contexts of {points[0].context} to {points[-1].context} tokens"
        return decode.seconds, grown_s, f"{at}, by {source}"
    if decode.attention_s:
        at = f"attention takes {ms(decode.attention_s)} of {ms(decode.seconds)} a token"
        return decode.seconds, min(decode.attention_s, decode.seconds), f"{at}, the most that the context can cost"
    return None


def _judged(change: str, metric: str, gain: float, because: str, assumes: str) -> Advice:
    """Make advice with its gain. A negligible gain is given in words."""
    told = because if _worth(gain) else f"{because}: {n.ratio(gain)} at most"
    return Advice(change, {metric: _worth(gain)}, told, assumes)


def _worth(gain: float) -> float | None:
    """A predicted gain, or None if it is negligible."""
    return gain if gain >= MIN_GAIN else None
