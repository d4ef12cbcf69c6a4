"""What the user could change, with the gain that the roofline predicts: pure functions over the findings.

Every prediction is for the variant that serves now (the profile after tuning, if there is one) and for one change at a
time. It follows from measured times, counted bytes and FLOPs, and for other machines from data sheets. Advice is left
out if something that it needs was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..diagnose.ceilings import attainable_bandwidth, attainable_peak, roofline_s
from ..diagnose.diagnosis import FULL, UNITS, Bottleneck, overhead_s
from ..machine.catalogue import MACHINES, Machine
from ..machine.roofline import floor_s
from ..profile.operators import SMALL_KERNEL_S
from ..profile.scaling import growth_s
from ..report import numbers as n
from ..workload import METRIC_OF, PHASES, Phase

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile, Profile, ScalePoint
    from ..machine.hardware import Hardware
    from .findings import Findings

MIN_GAIN = 1.05  # least speed-up that counts; two profiles of the same model differ by up to 5 %
MIN_MACHINE_GAIN = 1.25  # least speed-up by data sheets that counts; they promise 10 to 25 % more than is measured
NEAR_BEST = 0.9  # share of the best throughput at which a batch is large enough; beyond it, mostly latency grows
CLEARLY = 2.0  # ratio of the compute and memory floors from which the longer one alone decides
SHARED = 4  # query heads per key and value head of common models with grouped-query attention (Llama 3 8B: 32 / 8)


@dataclass(frozen=True)
class Advice:
    """One thing that the user could change.

    Args:
        change: the change, as a noun phrase.
        speedups: metric concerned ("ttft", "tpot", or "throughput": tokens per second of all sequences together) ->
            predicted speed-up; None if the change would bring little or nothing.
        because: the numbers that the prediction follows from, and their sources.
        assumes: further assumptions, as a clause after "assumes that"; empty if there are none.
    """

    change: str
    speedups: Mapping[str, float | None]
    because: str
    assumes: str = ""


@dataclass(frozen=True)
class ServingVariant:
    """The variant that serves now.

    Args:
        profile: profile of the variant.
        hardware: this machine, measured.
        bottlenecks: what limits each phase; a phase that was not diagnosed is missing.
        operators: number of operators that the original dispatches per call or token, by phase.
    """

    profile: Profile
    hardware: Hardware
    bottlenecks: Mapping[Phase, Bottleneck]
    operators: Mapping[Phase, int]

    def sequence_bytes(self) -> float:
        """Bytes of one sequence's cache and activations."""
        memory = self.profile.memory
        return (memory.cache_bytes + memory.activations_bytes) / self.profile.batch

    def room(self) -> float:
        """Number of sequences that fit into memory beside the weights."""
        free = FULL * self.hardware.memory_bytes - self.profile.memory.weights_bytes
        return max(0, free // self.sequence_bytes()) if self.sequence_bytes() else float("inf")

    def rest_of_cache(self, point: ScalePoint) -> tuple[float, float]:
        """Bytes of a sequence's cache beyond the context of `point`, and seconds to read them at decode's rate."""
        decode = self.profile.phases["decode"]
        beyond = max(0.0, 1 - point.context / self.profile.prompt_tokens)
        missing = beyond * decode.cache_bytes / self.profile.batch
        return missing, missing * decode.seconds / decode.moved_bytes if missing else 0.0

    def throughput(self, point: ScalePoint) -> float:
        """Tokens per second at a measured batch size, with the cache of the workload's context."""
        return point.batch / (point.seconds_per_step + point.batch * self.rest_of_cache(point)[1])


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
    also = f", attention's from {_ms(prefill.attention_s)} to {_ms(attention_s)}" if prefill.attention_s else ""
    yield _judged(
        f"Prompts of {tokens // 2} tokens instead of {tokens}",
        "ttft",
        prefill.seconds / then_s,
        f"the roofline of matmuls over {n.scaled(weights, 'B')} of weights shrinks their time from "
        f"{_ms(prefill.linear_s)} to {_ms(linear_s)}{also}, of {_ms(prefill.seconds)} {UNITS['prefill']}",
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


def other_machines(served: ServingVariant) -> Iterator[Advice]:
    """Use a faster machine, by data sheets: for each kind, the one with the least and the one with the most gain."""
    found = [(machine, gains) for machine in MACHINES if (gains := elsewhere(served, machine))]
    ranked = sorted(found, key=lambda item: prod(item[1].values()) ** (1 / len(item[1])))
    for kind in sorted({machine.device for machine, _ in ranked}, key=lambda device: device != served.hardware.device):
        same = [item for item in ranked if item[0].device == kind]
        for machine, gains in same[:1] + same[1:][-1:]:
            yield Advice(machine.name, gains, _figures(served, machine, gains), _assumed(served, machine, gains))


def elsewhere(served: ServingVariant, machine: Machine) -> dict[str, float] | None:
    """Metric -> speed-up on another machine; None if it gains too little, loses in a phase, or has too little memory.

    Overhead time stays the same. The other time keeps its share of the roofline. From a CPU to a GPU, overhead is at
    least one launch for every operator of the original.
    """
    memory, gains = served.profile.memory, dict[str, float]()
    needed = memory.weights_bytes + memory.cache_bytes + memory.activations_bytes
    too_small = machine.memory_bytes is not None and needed > FULL * machine.memory_bytes
    if machine.is_here(served.hardware) or too_small:
        return None
    for phase in PHASES:
        if (found := served.profile.phases.get(phase)) is None or (there_s := _sheet_s(found, machine)) is None:
            continue
        if here_s := _here_s(found, served.hardware):
            kept_s, worked_s = _divided(found)
            launched_s = _launches(served, machine).get(phase, 0) * SMALL_KERNEL_S
            gains[METRIC_OF[phase]] = found.seconds / (max(kept_s, launched_s) + worked_s * there_s / here_s)
    useful = gains and min(gains.values()) >= 1 and max(gains.values()) >= MIN_MACHINE_GAIN
    return gains if useful else None


def no_use(served: ServingVariant) -> Iterator[Advice]:
    """Name common changes that would not help a phase with this bottleneck."""
    for phase, found in served.profile.phases.items():
        peak, bandwidth = attainable_peak(found, served.hardware), attainable_bandwidth(found, served.hardware)
        compute_s, move_s, spent_s = found.flops / peak, found.moved_bytes / bandwidth, overhead_s(found)
        rate = f"{n.scaled(peak, 'FLOP/s')} in {found.compute_dtype}"
        computing = f"its {n.scaled(found.flops, 'FLOP')} {UNITS[phase]} taking {_ms(compute_s)} at {rate}"
        moving = f"its {n.scaled(found.moved_bytes, 'B')} taking {_ms(move_s)} at {n.scaled(bandwidth, 'B/s')}"
        match served.bottlenecks.get(phase):
            case "compute" if compute_s >= CLEARLY * move_s:
                change = f"Quantised weights, still multiplied in {found.compute_dtype}, or faster memory"
                because = f"it is compute-bound, {computing}, {moving}"
            case "memory" | "kv-cache" as bound if move_s >= CLEARLY * compute_s:
                change, because = "More FLOP/s at the same bandwidth", f"it is {bound}-bound, {moving}, {computing}"
            case "overhead" if found.seconds < MIN_MACHINE_GAIN * spent_s:
                change = "Faster memory or more FLOP/s"
                spent = (
                    f"{_ms(spent_s)} of {_ms(found.seconds)} {UNITS[phase]} pass between operators and in small ones"
                )
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
        f"a step of {point.batch} sequences takes {_ms(point.seconds_per_step)}, one of {base.batch} "
        f"{_ms(base.seconds_per_step)}, measured at a context of {point.context} tokens"
    )
    missing, seconds = served.rest_of_cache(point)
    more = f" (and {_ms(seconds)} for each sequence's {n.scaled(missing, 'B')} of cache beyond that)"
    return measured + more if missing else measured


def _context_s(served: ServingVariant) -> tuple[float, float, str] | None:
    """Seconds per token, the part of them that the context costs, and the source; None if it was not measured."""
    decode, points = served.profile.phases.get("decode"), served.profile.context_growth
    if decode is None:
        return None
    if len(points) > 1 and served.profile.batch == points[0].batch:
        tokens = served.profile.prompt_tokens
        grown_s = min(growth_s(points, tokens), decode.seconds)
        at = f"a prompt of {tokens} tokens costs {_ms(grown_s)} of {_ms(decode.seconds)} a token"
        source = f"the growth measured from contexts of {points[0].context} to {points[-1].context} tokens"
        return decode.seconds, grown_s, f"{at}, by {source}"
    if decode.attention_s:
        at = f"attention takes {_ms(decode.attention_s)} of {_ms(decode.seconds)} a token"
        return decode.seconds, min(decode.attention_s, decode.seconds), f"{at}, the most that the context can cost"
    return None


def _sheet_s(phase: PhaseProfile, machine: Machine) -> float | None:
    """The phase's floor by a data sheet, seconds; None if the sheet has no peak for the phase's dtype."""
    peak = machine.flops_per_s.get(phase.compute_dtype)
    return floor_s(phase.flops, phase.moved_bytes, peak, machine.bandwidth_bytes_per_s) if peak else None


def _here_s(phase: PhaseProfile, hardware: Hardware) -> float:
    """The phase's floor on this machine, seconds: by its data sheet, as for other machines, else by measured peaks."""
    sheet = _sheet(hardware)
    return (_sheet_s(phase, sheet) if sheet else None) or roofline_s(phase, hardware)


def _sheet(hardware: Hardware) -> Machine | None:
    """This GPU's data sheet. A CPU's is not used: which share of its cores and channels we have is unknown."""
    return next((m for m in MACHINES if m.device == hardware.device == "cuda" and m.is_here(hardware)), None)


def _divided(phase: PhaseProfile) -> tuple[float, float]:
    """Split a phase's time into seconds of overhead and of work."""
    kept_s = min(overhead_s(phase), phase.seconds)
    return kept_s, phase.seconds - kept_s


def _launches(served: ServingVariant, machine: Machine) -> Mapping[Phase, int]:
    """Number of the original's operators to launch, by phase, if a model moves from a CPU to a GPU; else empty."""
    return served.operators if (served.hardware.device, machine.device) == ("cpu", "cuda") else {}


def _figures(served: ServingVariant, machine: Machine, gains: Mapping[str, float]) -> str:
    """Describe both machines' figures, for the dtypes that serve."""
    dtypes = dict.fromkeys(found.compute_dtype for p, found in served.profile.phases.items() if METRIC_OF[p] in gains)

    def figures(of: Machine | Hardware) -> str:
        rates = [f"{n.scaled(of.flops_per_s.get(dtype), 'FLOP/s')} in {dtype}" for dtype in dtypes]
        return ", ".join((n.scaled(of.bandwidth_bytes_per_s, "B/s"), *rates))

    sheet = _sheet(served.hardware)
    here = f"{figures(sheet)} by data sheet here" if sheet else f"{figures(served.hardware)} measured here"
    return f"{figures(machine)} ({machine.source}), against {here}"


def _assumed(served: ServingVariant, machine: Machine, gains: Mapping[str, float]) -> str:
    """Describe what a prediction for another machine assumes from this one."""
    shares, kept, launched = list[str](), list[str](), list[str]()
    launches = _launches(served, machine)
    for phase, found in served.profile.phases.items():
        if METRIC_OF[phase] in gains:
            kept_s, worked_s = _divided(found)
            share = min(1.0, _here_s(found, served.hardware) / worked_s) if worked_s else None
            shares.append(f"{phase} {n.percent(share)}")
            kept.append(f"{_ms(kept_s)} {UNITS[phase]}")
            launched.append(f"{launches.get(phase, 0)} {UNITS[phase]}")
    work = f"work reaches the same share of the roofline as here ({', '.join(shares)})"
    overhead = f"overhead stays ({', '.join(kept)})"
    if launches:
        per_launch = f"{1e6 * SMALL_KERNEL_S:.0f} us to launch each of the original's operators ({', '.join(launched)})"
        overhead += f", or takes {per_launch} where that is longer"
    return f"{work}, and that {overhead}"


def _judged(change: str, metric: str, gain: float, because: str, assumes: str) -> Advice:
    """Make advice with its gain. A negligible gain is given in words."""
    told = because if _worth(gain) else f"{because}: {n.ratio(gain)} at most"
    return Advice(change, {metric: _worth(gain)}, told, assumes)


def _worth(gain: float) -> float | None:
    """A predicted gain, or None if it is negligible."""
    return gain if gain >= MIN_GAIN else None


def _ms(seconds: float) -> str:
    return f"{n.milliseconds(1e3 * seconds)} ms"
