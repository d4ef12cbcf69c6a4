"""Records a baseline: a model's answers, and how long they take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ... import workload
from ...errors import WorkloadError
from ...model import configured
from ...runtime.variant import Variant
from ...validate.exam import UNBOUNDED, Exam
from ...validate.quality import FULL_BYTES
from ...validate.score import Served
from ...validate.texts import LONGEST_CONTEXT, Text
from ...validate.timing import Clock
from ...workload import Bucket, Workload, built_in
from . import harness, pace, subject, tasks
from .baseline import Baseline, Questions
from .compact import Compact
from .folder import require_free, save
from .layers import PROMPTS, fingerprint
from .tasks import Suite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("autotune")

NEW_TOKENS = 32  # most new tokens of a timed request


def record(
    model: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Any = None,
    size: Literal["quick", "standard", "thorough"] = "quick",
    labelled: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    latency: bool = True,
    batch_sizes: Sequence[int] = (1,),
    force: bool = False,
    clock: Clock = time.perf_counter,
    progress: Callable[[str], None] | None = None,
) -> Baseline:
    """Record what later checks compare with, and write it to a folder.

    Args:
        model: a causal LM in eval mode, wrapped or not. Quality is recorded of the original, latency of the variant
            that serves.
        out: folder to write; see `autotune.compare.check.folder`.
        tokenizer: needed for prompts and tasks given as text, and to detect another tokenizer later.
        prompts: prompts, as `autotune.wrap` takes a workload; default: built-in texts, which are enough for "quick".
        size: size of the exam: 16, 64 or 128 prompts, with about 500, 3,000 or 12,000 scored tokens.
        labelled: a .jsonl file of tasks; see `autotune.compare.check.tasks.read`.
        lm_eval: tasks of lm-evaluation-harness, if it is installed.
        latency: whether requests are timed.
        batch_sizes: batch sizes that are timed.
        force: whether to replace an existing baseline.
        clock: returns monotonic seconds.
        progress: called with a sentence for each step; default: the "autotune" logger.

    Raises:
        UnsupportedModelError: the model is not a causal LM in eval mode.
        WorkloadError: prompts or tasks cannot be used, or there are too few for the size.
        BaselineError: the folder exists.
        MeasurementError: the model raised, gave logits that are not finite or did not reproduce its answers, the
            harness is not installed, or the folder cannot be written.
    """
    folder, notify = Path(out), progress or log.info
    require_free(folder, force)
    if size not in ("quick", "standard", "thorough"):
        raise WorkloadError(f"the size is {size!r}; expected quick, standard or thorough")
    variant = subject.serving(model)
    original = variant.original
    work = _work(prompts, tokenizer, original, batch_sizes)
    harness.require(lm_eval)
    width, longest = configured.vocabulary(original), configured.context(original) or UNBOUNDED
    given = tasks.read(Path(labelled), tokenizer, width, longest) if labelled is not None else ()
    exam = Exam.prepare(
        original,
        work.prompts,
        size=size,
        pad_token_id=_pad(original),
        progress=lambda step, share: notify(f"{step}, {share:.0%}"),
    )
    if exam.problem:
        raise WorkloadError(f"a baseline of size {size} cannot be recorded: {exam.problem}")
    questions, answers = _questions(exam, work, size), _answers(exam, notify)
    narrow = original.dtype.itemsize < FULL_BYTES
    stepped = _answers(exam, notify, stepped=True) if narrow else ()
    notify("reading the layers' outputs")
    layers = fingerprint(original, questions.read[:PROMPTS])
    suites = _suites(variant, given, lm_eval, tokenizer, exam.pad_token_id, notify)
    dtype, width = _logits(exam)
    baseline = Baseline(
        subject=subject.describe(variant, tokenizer, dtype, width),
        environment=subject.environment(original),
        questions=questions,
        answers=answers,
        layers=layers,
        pace=pace.measure(variant, buckets(work), work.prompts, clock=clock, notify=notify) if latency else (),
        suites=suites,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        stepped=stepped,
    )
    save(baseline, folder, force=force)
    return baseline


def buckets(work: Workload) -> tuple[Bucket, ...]:
    """Shapes that are timed: the workload's, with at most `NEW_TOKENS` new tokens."""
    return replace(work, new_tokens=min(work.new_tokens, NEW_TOKENS)).buckets()


def _work(
    prompts: Any, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, batch_sizes: Sequence[int]
) -> Workload:
    if prompts is None:
        if tokenizer is None:
            raise WorkloadError("without a tokenizer prompts are needed: token ids, one list each")
        prompts = _second_half(tokenizer)
    return workload.read(prompts, tokenizer=tokenizer, model=model, batch_sizes=batch_sizes)


def _second_half(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The second half of the built-in texts. Policies that a check applies are tuned on the first half."""
    found = built_in.chats(tokenizer)
    return [ids[:LONGEST_CONTEXT] for ids in found[len(found) // 2 :]]


def _pad(model: PreTrainedModel) -> int:
    config = model.generation_config
    pad = config.pad_token_id if config is not None else None
    return pad if isinstance(pad, int) else 0


def _questions(exam: Exam, work: Workload, size: str) -> Questions:
    return Questions(
        size=size,
        pad_token_id=exam.pad_token_id,
        eos_token_ids=exam.eos_token_ids,
        noise_kld=exam.noise_kld,
        tie_nats=exam.tie_nats,
        prompts=work.prompts,
        texts=exam.texts,
        batches=exam.batches,
        long=exam.long,
    )


def _answers(exam: Exam, notify: Callable[[str], None], *, stepped: bool = False) -> tuple[Compact, ...]:
    groups = exam.groups()
    found = []
    for k, group in enumerate(groups):
        notify(f"keeping what matters of the logits{' of decoding' if stepped else ''}, {k} of {len(groups)}")
        found.append(_compact(exam, group, k, stepped))
    return tuple(found)


def _compact(exam: Exam, group: tuple[Text, ...], seed: int, stepped: bool) -> Compact:
    logits = exam.reference(group, stepped=stepped).float()  # [B, T, V]
    targets = torch.tensor([text.scored for text in group], dtype=torch.int64, device="cpu")  # [B, T]
    return Compact.of(logits.flatten(0, 1), targets.flatten(), seed)


def _logits(exam: Exam) -> tuple[str, int]:
    """Dtype and width of the model's logits."""
    logits = exam.read(Served(Variant(exam.original), exam.pad_token_id), exam.texts[0])
    return str(logits.dtype).removeprefix("torch."), logits.shape[-1]


def _suites(
    variant: Variant,
    given: Sequence[tasks.Task],
    lm_eval: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    pad: int,
    notify: Callable[[str], None],
) -> tuple[Suite, ...]:
    found = []
    if given:
        notify(f"answering {len(given)} tasks")
        right = tasks.answer(variant, given, tokenizer, pad)
        found.append(Suite("tasks", tuple(given), tuple(map(str, range(len(given)))), right))
    for name in lm_eval:
        notify(f"running {name} of lm-evaluation-harness")
        found.append(harness.answer(variant, name, tokenizer))
    return tuple(found)
