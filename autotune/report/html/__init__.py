"""Render a record as one self-contained page of HTML.

    elements (escaped markup) -> drawing (charts) -> one file a chapter -> page

A chapter is made by a function from a record to HTML, or to None if the record has no data for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .. import candidates, device, sections
from .. import numbers as n
from ..layout import sentence
from . import growth, operators, quality, roofline, samples, steps, trials
from .elements import Chapter, Html, badge, cleaned, code, element, joined, paragraphs, section, table, titled
from .page import page


def render(record: Mapping[str, Any]) -> str:
    """Return the whole report as one page.

    Args:
        record: the result of `Report.to_dict`, also of an earlier version.

    Raises:
        PackageError: matplotlib is not installed.
    """
    shown = cleaned(record)
    chapters = (chapter(shown) for chapter in CHAPTERS)
    title = f"{sections.headline(shown).partition(',')[0]}: autotune report"
    return page(title, heading(shown), chapters, record, "report.json")


def heading(record: Mapping[str, Any]) -> Html:
    """Return the head of the page: the verdict with its numbers."""
    name, _, rest = sections.headline(record).partition(", ")
    told = [element("p", "autotune report", class_="eyebrow"), element("h1", name), element("p", rest, class_="muted")]
    told += [element("p", badge(*state(record)), " ", element("strong", lead(record)), class_="lead")]
    told += [element("div", *(_tile(*tile) for tile in tiles(record)), class_="tiles")]
    if record["transforms"]:
        applied = element("ol", *(element("li", code(name)) for name in record["transforms"]))
        told += [element("h3", "Applied, in this order"), applied]
    story = [text for text in sections.result(record).sentences if not text.startswith("Applied, in this order")]
    return joined((*told, element("div", paragraphs(story), class_="story muted")))


def state(record: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the outcome in a word or two, and its tone."""
    if record["transforms"]:
        return ("replayed" if record["replayed"] else "tuned"), "good"
    if record.get("doubt"):
        return "original kept", "doubt"
    return ("original kept" if record["policy"]["name"] else "profiled"), None


def lead(record: Mapping[str, Any]) -> str:
    """Return the verdict in a sentence with its numbers."""
    latency, phases = record["latency"], record["phases"]
    if not record["transforms"] or latency is None:
        return sentence(record["verdict"])
    whole = latency["end_to_end"]
    bounds = n.interval(whole["low"], whole["high"])
    parts = [f"A request takes {n.percent(1 / whole['ratio'])} of its time" if n.known(whole["ratio"]) else "Tuned"]
    if bounds:
        parts[0] = f"{n.ratio(whole['ratio'])} as fast ({bounds}) for a whole request"
    waits = {"decode": "ms per token", "prefill": "ms to the first token"}
    parts += [
        f"{n.milliseconds(phases[phase]['baseline_ms'])} to {n.milliseconds(phases[phase]['final_ms'])} {unit}"
        for phase, unit in waits.items()
        if phase in phases
    ]
    return f"{', '.join(parts)}. {_quality(record)}".strip()


def _quality(record: Mapping[str, Any]) -> str:
    found = record["quality"]
    if not n.known(found["mean_kld"]):
        return ""
    kld, same = n.divergence(found["mean_kld"]), n.percent(found["same_top"], 1)
    verdict = {"pass": "within", "fail": "outside"}.get(found["verdict"], f"{found['verdict']} for")
    return f"Output {verdict} quality tier {found['tier']}: mean KL divergence {kld} nat, {same} the same top token."


def tiles(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the main numbers, each with its title and a figure to compare it with."""
    tuned = bool(record["transforms"])
    for phase, title in (("decode", "per token"), ("prefill", "to the first token")):
        if phase not in record["phases"]:
            continue
        f = record["phases"][phase]
        bounds = n.interval(f["speedup_low"], f["speedup_high"])
        gain = n.ratio(f["speedup"]) + (f" ({bounds})" if bounds else "")
        compared = f"{gain}, was {n.milliseconds(f['baseline_ms'])} ms" if tuned else f"limited by {f['bottleneck']}"
        yield f"{phase}, {title}", f"{n.milliseconds(f['final_ms'])} ms", compared
    if tuned and record["latency"]:
        whole = record["latency"]["end_to_end"]
        yield "whole request", n.ratio(whole["ratio"]), n.interval(whole["low"], whole["high"]) or "no interval"
    if n.known(record["quality"]["mean_kld"]):
        q = record["quality"]
        yield "mean KL divergence, nat", n.divergence(q["mean_kld"]), f"{q['verdict']} at tier {q['tier']}"
    before, after = record["memory"]["before"], record["memory"]["after"]
    weights = record.get("bytes_after_release") or after["weights_bytes"]
    compared = f"was {n.scaled(before['weights_bytes'], 'B')}" if tuned else "as loaded"
    kept = "" if record.get("bytes_after_release") or not tuned else ", kept beside"
    yield "weights", n.scaled(weights, "B"), compared + kept
    if tuned and n.known(record["break_even_tokens"]):
        yield "pays for itself after", n.count(record["break_even_tokens"]), "generated tokens"


def _tile(title: str, value: str, compared: str) -> Html:
    return element(
        "div",
        element("p", title, class_="muted"),
        element("p", value, class_="figure"),
        element("p", compared, class_="muted"),
        class_="tile",
    )


def memory(record: Mapping[str, Any]) -> Chapter:
    return Chapter("memory", "Memory", section(sections.memory(record)))


def gpu(record: Mapping[str, Any]) -> Chapter | None:
    """Show what the GPU did; None on a CPU."""
    found = tuple(device.sections(record))
    return Chapter("device", "The GPU", joined(map(titled, found))) if found else None


def bypassed(record: Mapping[str, Any]) -> Chapter | None:
    found = sections.bypassed(record)
    return Chapter("bypassed", found.title, section(found)) if found is not None else None


def contributions(record: Mapping[str, Any]) -> Chapter | None:
    found = candidates.contributions(record)
    return Chapter("contributions", found.title, section(found)) if found is not None else None


def method(record: Mapping[str, Any]) -> Chapter:
    return Chapter("method", "How it was measured", section(sections.method(record)))


def advice(record: Mapping[str, Any]) -> Chapter | None:
    """Show what the user could change, and below it what would not help."""
    title, parts = "What you could change", list[Html]()
    for found in sections.advice(record):
        drawn = table(found.table, found.title, stacked=True) if found.table is not None else None
        shown = joined((paragraphs(found.sentences), drawn))
        parts.append(shown if found.title == title else joined((element("h3", found.title), shown)))
    return Chapter("advice", title, joined(parts)) if parts else None


CHAPTERS: tuple[Callable[[Mapping[str, Any]], Chapter | None], ...] = (
    roofline.chapter,
    steps.chapter,
    contributions,
    trials.chapter,
    samples.chapter,
    quality.chapter,
    operators.chapter,
    growth.chapter,
    memory,
    gpu,
    bypassed,
    method,
    advice,
)
