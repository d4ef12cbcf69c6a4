"""The content and order of a report: pure functions from a record to sentences and tables of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from ..machine.busy import is_noticeable
from . import candidates, device
from . import numbers as n
from .layout import Section, Table, sentence

UNIT = {"prefill": "ms to the first token", "decode": "ms per token"}
GAINS = {"tpot": "decode", "ttft": "prefill", "throughput": "tokens/s"}
WAIT = {"prefill": "time to first token", "decode": "time per token"}


def sections(record: Mapping[str, Any]) -> tuple[Section, ...]:
    """Return all sections of a record, the result first. Values that were not measured have no section."""
    found = (
        result(record),
        diagnosis(record),
        *operators(record),
        *device.sections(record),
        candidates.contributions(record),
        candidates.could_not_be_tried(record),
        candidates.tried(record),
        candidates.not_tried(record),
        quality(record),
        growth(record, "batch_scaling", "Decode by batch size", "batch"),
        growth(record, "context_growth", "Decode by context length", "context"),
        callers(record),
        memory(record),
        bypassed(record),
        method(record),
        *advice(record),
    )
    return tuple(s for s in found if s is not None)


def headline(record: Mapping[str, Any]) -> str:
    model, policy = record["model"], record["policy"]
    name = PurePath(model["name"]).name if model["name"].startswith("/") else model["name"]
    words = [name, f"{n.count(model['parameters'])} parameters"]
    if policy["name"]:
        words.append(f"policy {policy['name']} (objective {policy['objective']}, quality tier {policy['tier']})")
    return ", ".join(words)


def result(record: Mapping[str, Any]) -> Section:
    """Return the verdict and the main numbers."""
    phases = record["phases"].items()
    if not record["transforms"]:  # nothing was changed, so there is nothing to compare
        rows = [(f"{p}, {WAIT[p]}", _ms(f["baseline_ms"]), f["bottleneck"], n.ratio(f["ceiling"])) for p, f in phases]
        table = Table(("", "time", "bottleneck", "ceiling"), "lrlr", tuple(rows))
        return Section("Result", tuple(_story(record)), table)
    compared = [(f"{p}, {WAIT[p]}", _ms(f["baseline_ms"]), _ms(f["final_ms"]), *_gain(f)) for p, f in phases]
    if decode := record["phases"].get("decode"):
        rates = (_per_second(decode["baseline_ms"]), _per_second(decode["final_ms"]))
        compared.append(("decode, tokens per second", *rates, "", ""))
    if record["latency"]:
        whole = record["latency"]["end_to_end"]
        compared.append(("whole request", "", "", n.ratio(whole["ratio"]), n.interval(whole["low"], whole["high"])))
    table = Table(("", "before", "after", "speed-up", "95 % interval"), "lrrrr", tuple(compared))
    return Section("Result", tuple(_story(record)), table)


def _gain(figures: Mapping[str, Any]) -> tuple[str, str]:
    return n.ratio(figures["speedup"]), n.interval(figures["speedup_low"], figures["speedup_high"])


def _ms(ms: float | None) -> str:
    return f"{n.milliseconds(ms)} ms"


def _per_second(ms: float | None) -> str:
    return n.significant(1e3 / ms) if n.known(ms) and ms > 0 else n.MISSING


def _story(record: Mapping[str, Any]) -> Iterator[str]:
    yield sentence(record["verdict"])
    elsewhere = (record["replayed"] or record).get("elsewhere")  # records of earlier versions have none
    if n.known(elsewhere) and is_noticeable(elsewhere):
        yield f"This machine was busy: {n.percent(elsewhere)} of the CPU time went elsewhere."
    if doubt := record.get("doubt"):  # records of earlier versions have none
        yield f"This outcome is not kept as a plan, and the next run searches anew: {doubt}."
    if record["transforms"]:
        yield "Applied, in this order: " + "; ".join(record["transforms"]) + "."
    if replayed := record["replayed"]:
        since = f" of {replayed['tuned']}" if replayed["tuned"] else ""
        yield (
            f"Replayed from the plan{since}, verified again in {n.duration(replayed['seconds'])}; "
            "profiles and trials below are those of the tuning."
        )
    elif n.known(record["seconds"]):
        budget = record["policy"]["budget_s"]
        yield f"Tuning took {n.duration(record['seconds'])}" + (
            f" of a budget of {n.duration(budget)}." if n.known(budget) else "."
        )
    if record["transforms"] and n.known(record["break_even_tokens"]):
        yield f"It has paid for itself after {n.count(record['break_even_tokens'])} generated tokens."


def diagnosis(record: Mapping[str, Any]) -> Section:
    """Return the diagnosis of each phase before tuning and, if the model was changed, after it."""
    sentences = [sentence(d["evidence"]) for d in record["phases"].values()]
    if record["transforms"]:
        sentences += [sentence(f"now {d['evidence']}") for d in record["diagnoses_after"].values()]
    return Section("Diagnosis", tuple(sentences))


def operators(record: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the operator tables of decode, then of prefill, with the longest operation first."""
    tuned = bool(record["transforms"])
    for phase in ("decode", "prefill"):
        if not (rows := record["operators"].get(phase)):
            continue
        before, after = sum(r["before_ms"] for r in rows), sum(r["after_ms"] for r in rows)
        rows = sorted(rows, key=lambda r: -r["before_ms"])
        total = {"group": "total", "before_ms": before, "share": 1.0, "after_ms": after, "bottleneck": ""}
        cells = tuple(_operator_row(r, tuned) for r in (*rows, total))
        columns = ("operation", "before ms", "share", "bottleneck", "after ms", "change")
        table = (
            Table(columns, "lrrlrr", cells, total=True)
            if tuned
            else Table(("operation", "ms", "share", "bottleneck"), "lrrl", cells, total=True)
        )
        yield Section(f"Where {phase} spends its time ({UNIT[phase]})", table=table)


def _operator_row(row: Mapping[str, Any], tuned: bool) -> tuple[str, ...]:
    cells = (row["group"], n.milliseconds(row["before_ms"]), n.percent(row["share"]), row["bottleneck"])
    if not tuned:
        return cells
    return *cells, n.milliseconds(row["after_ms"]), n.change(row["before_ms"], row["after_ms"])


def quality(record: Mapping[str, Any]) -> Section | None:
    """Compare the plan's output distribution with the original's."""
    q, detail = record["quality"], record["quality_detail"]
    if detail is None:
        return None
    rows = [
        ("mean KL divergence (nat)", n.divergence(q["mean_kld"]), "<= " + n.divergence(detail["mean_kld_high"])),
        ("99th percentile of it", n.divergence(q["p99_kld"]), ""),
        ("same top token", n.percent(q["same_top"], 1), ">= " + n.percent(detail["same_top_low"], 1)),
        ("perplexity ratio", _four(q["ppl_ratio"]), "<= " + _four(detail["ppl_ratio_high"])),
        *((f"mean KL divergence, {name}", n.divergence(kld), "") for name, kld in detail["strata"].items()),
    ]
    rows = [(name, value, "" if bound.endswith(n.MISSING) else bound) for name, value, bound in rows]
    size = f"{n.count(detail['tokens'])} tokens of {n.count(detail['prompts'])} prompts"
    told = [f"Tier {q['tier']}: {q['verdict']} on {size}, against the original. {sentence(detail['reason'])}".strip()]
    if record["replayed"] and (again := record["replayed"].get("quality")):
        told.append(f"Checked again in this run, on less: {again['verdict']}. {sentence(again['reason'])}")
    return Section("Quality", tuple(told), Table(("measure", "measured", "95 % bound"), "lrr", tuple(rows)))


def _four(value: float | None) -> str:
    return f"{value:.4f}" if n.known(value) else n.MISSING


def growth(record: Mapping[str, Any], key: str, title: str, axis: str) -> Section | None:
    """Show how decode grows with batch size or context length."""
    points = record[key]
    if not points:
        return None
    tuned = bool(record["transforms"]) and any(n.known(p["after_tokens_per_s"]) for p in points)
    columns = (axis, "ms per step", "tok/s", "after ms", "after tok/s") if tuned else (axis, "ms per step", "tok/s")
    rows = []
    for p in points:
        cells = [str(p[axis]), n.milliseconds(p["ms_per_step"]), n.milliseconds(p["tokens_per_s"])]
        if tuned:
            cells += [n.milliseconds(p["after_ms_per_step"]), n.milliseconds(p["after_tokens_per_s"])]
        rows.append(tuple(cells))
    return Section(title, table=Table(columns, "r" * len(columns), tuple(rows)))


def callers(record: Mapping[str, Any]) -> Section | None:
    """Show what decoding several callers together brings, if the policy asks for it."""
    found = record.get("callers")  # records of earlier versions have none
    if not found:
        return None
    said = [sentence(found["reason"])]
    if n.known(found["gap_ms"]):
        said.append(
            f"While a prompt of {found['long_prompt']} tokens arrives, the longest time between two tokens of a "
            f"running answer is {n.milliseconds(found['gap_ms'])} ms."
        )
    if not found["points"]:
        return Section("Callers at once", tuple(said))
    said.append(f"One at a time, they get {n.milliseconds(found['alone_tokens_per_s'])} tokens per second.")
    rows = tuple(
        (
            str(p["callers"]),
            n.milliseconds(p["tokens_per_s"]),
            n.ratio(p["ratio"]),
            f"{n.ratio(p['ratio_low'])} to {n.ratio(p['ratio_high'])}",
            n.milliseconds(p["ttft_ms"]),
            n.milliseconds(p.get("tpot_ms")),
        )
        for p in found["points"]
    )
    columns = ("callers", "tokens/s together", "against one at a time", "lowest to highest", "TTFT, ms", "TPOT, ms")
    return Section("Callers at once", tuple(said), Table(columns, "rrrrrr", rows))


def memory(record: Mapping[str, Any]) -> Section | None:
    """Show peak memory by owner, and whether it includes the original."""
    before, after = record["memory"]["before"], record["memory"]["after"]
    if released := record.get("bytes_after_release"):  # records of earlier versions have none
        after = after | {"weights_bytes": released}
    names = {"weights_bytes": "weights", "cache_bytes": "KV cache", "activations_bytes": "activations"}
    rows = [(name, before[key], after[key]) for key, name in names.items()]
    rows.append(("total", sum(before.values()), sum(after.values())))
    if not record["transforms"]:
        plain = tuple((name, n.scaled(was, "B")) for name, was, _ in rows)
        return Section("Memory", table=Table(("owner", "peak"), "lr", plain, total=True))
    cells = tuple((name, n.scaled(was, "B"), n.scaled(now, "B"), n.change(was, now)) for name, was, now in rows)
    if released:
        note = f"Without the original the weights take {n.ratio(released / before['weights_bytes'])} of its bytes."
    else:
        note = "The original is kept beside the plan: for calls the plan cannot serve, and for rollback."
    return Section("Memory", (note,), Table(("owner", "before", "after", "change"), "lrrr", cells, total=True))


def bypassed(record: Mapping[str, Any]) -> Section | None:
    """Return the calls that the plan could not serve, by reason."""
    if not record["bypassed"]:
        return None
    rows = (("(by the plan)", str(record["served"])), *((why, str(calls)) for why, calls in record["bypassed"].items()))
    served_by = "the plan's layers one by one" if record.get("bytes_after_release") else "the original"
    return Section(f"Calls that went to {served_by}", table=Table(("because of", "calls"), "lr", rows))


def method(record: Mapping[str, Any]) -> Section:
    """Describe how the figures were measured: date, machine, workload, noise."""
    hw, latency = record["hardware"], record["latency"]
    sentences = [
        f"{record['created'] or 'Undated'}, on {machine(hw)}.",
        "Libraries: " + ", ".join(f"{name} {version}" for name, version in hw["versions"].items()) + ".",
        f"Workload: {record['workload']}.",
    ]
    if latency is not None:
        pairs, noise = latency["end_to_end"]["pairs"], n.percent(latency["noise"], 1)
        timing = f"Latency: {pairs} interleaved pairs on prompts held out; this host's own noise is {noise}."
        sentences.append(f"{timing} {sentence(latency['reason'])}".strip())
        sentences += [f"Warning: {warning.rstrip('.')}." for warning in latency["warnings"]]
    return Section("How it was measured", tuple(sentences))


def advice(record: Mapping[str, Any]) -> Iterator[Section]:
    """Yield advice to the user: changes that would help and by how much, then changes that would not."""
    rows, useless, before = list[tuple[str, ...]](), list[str](), ""
    for found in record.get("advice") or ():  # records of earlier versions have none
        gains = [f"{GAINS[metric]} {n.ratio(gain)}" for metric, gain in found["speedups"].items() if n.known(gain)]
        because, assumes = sentence(found["because"]), found["assumes"]
        if not gains:
            useless.append(sentence(f"{found['change']}: {found['because']}"))
            continue
        if assumes:
            because += " Assumes the same." if assumes == before else f" Assumes that {assumes}."
        rows.append((found["change"], ", ".join(gains), because))
        before = assumes
    if rows:
        note = "Predicted for what serves now, one change at a time; none of it was tried."
        yield Section("What you could change", (note,), Table(("change", "predicted", "because"), "lll", tuple(rows)))
    if useless:
        yield Section("What would bring little or nothing", tuple(useless))


def machine(hw: Mapping[str, Any]) -> str:
    """Describe processor, threads, memory and peaks in a phrase."""
    peaks = [f"{n.scaled(rate, 'FLOP/s')} in {dtype}" for dtype, rate in hw["flops_per_s"].items() if n.known(rate)]
    figures = ", ".join((f"{n.scaled(hw['bandwidth_bytes_per_s'], 'B/s')}", *peaks))
    origin = "measured" if hw["measured"] else "partly from data sheets"
    if hw.get("disturbed"):  # records of earlier versions have no such key
        origin += " beside others' work, perhaps too low"
    about = f"{hw['name']} ({hw['device']}, {hw['capability']}), {hw['threads']} threads"
    return f"{about}, {n.scaled(hw['memory_bytes'], 'B')} of memory; {figures} ({origin})"
