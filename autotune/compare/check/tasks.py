"""Labelled tasks: which answers are right, and McNemar's test on those that changed.

If two models answered the same tasks, their two accuracies say little. The tasks whose outcome changed say more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import WorkloadError
from ...model import configured
from ...validate import Verdict
from ...validate.score import Served
from ...workload import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...runtime.variant import Variant

ALPHA = 0.05  # level of the test; one-sided, because only a loss is a regression
MAX_LOSS = 0.02  # net share of the tasks that may be lost
SPARE_TOKENS = 4  # tokens generated beyond the answer's length, because other tokens may spell the same answer
EXPECTED = 'expected {"prompt": ..., "answer": "text"} or {"prompt": ..., "choices": [...], "answer": index}'


@dataclass(frozen=True)
class Task:
    """A question with its answer.

    Args:
        prompt: token ids.
        choices: token ids of each choice, scored one by one by log-likelihood; empty if the answer is generated.
        index: index of the right choice.
        answer: token ids of the expected answer, if it is generated.
        text: the expected answer as text; empty if it was given as ids.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    index: int = 0
    answer: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks and their outcomes when they were recorded.

    Args:
        name: "tasks", or "lm-eval:TASK" for a task of the harness.
        tasks: the tasks; empty for the harness, which has its own.
        ids: names of the tasks.
        right: whether each task was answered correctly.
    """

    name: str
    tasks: tuple[Task, ...]
    ids: tuple[str, ...]
    right: tuple[bool, ...]


@dataclass(frozen=True)
class Flips:
    """Tasks whose outcome changed, and the verdict on them.

    Args:
        lost, won: ids of tasks that were right and are wrong now, and the reverse.
        total: number of all tasks.
        p_value: chance of at least this many losses among the changes, if both directions were equally likely
            (one-sided, exact).
        verdict, reason: as for every metric.
    """

    lost: tuple[str, ...]
    won: tuple[str, ...]
    total: int
    p_value: float
    verdict: Verdict
    reason: str


def read(
    file: Path, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int | None = None, context: int | None = None
) -> tuple[Task, ...]:
    """Read tasks from a .jsonl file.

    A choice, or an answer given as text, follows its prompt after a space, unless one of the two has white space there.

    Args:
        file: the file, with one task per line.
        tokenizer: needed for text.
        vocabulary: number of token ids that the model knows.
        context: most tokens of prompt and answer that the model can take.

    Raises:
        WorkloadError: a line is wrong; the message names it and what was expected.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise WorkloadError(f"the tasks {file} cannot be read as text ({error})") from error
    found = {k: _task(line, f"{file}, line {k}", tokenizer) for k, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise WorkloadError(f"{file} has no tasks; expected one per line: {EXPECTED}")
    for k, task in found.items():
        _require_fitting(task, f"{file}, line {k}", vocabulary, context)
    return tuple(found.values())


def _require_fitting(task: Task, where: str, vocabulary: int | None, context: int | None) -> None:
    """Refuse a task that the model cannot be asked.

    Raises:
        WorkloadError: the prompt or an answer is empty, a token id is unknown to the model, or the task is too long.
    """
    answers = task.choices or (task.answer,)
    if not task.prompt or not all(answers):
        raise WorkloadError(f"{where} has an empty prompt, answer or choice; expected at least one token")
    ids = [token for part in (task.prompt, *answers) for token in part]
    if vocabulary is not None and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = next(token for token in ids if not 0 <= token < vocabulary)
        raise WorkloadError(f"{where} has the token id {wrong}; the model knows 0 to {vocabulary - 1}")
    longest = len(task.prompt) + max(map(len, answers)) + (0 if task.choices else SPARE_TOKENS)
    if context is not None and longest > context:
        raise WorkloadError(f"{where} takes {longest} tokens; the model's context has {context}")


def _task(line: str, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{where} is not JSON ({error}); {EXPECTED}") from error
    if not isinstance(record, dict) or not {"prompt", "answer"} <= record.keys():
        raise WorkloadError(f"{where} has no prompt and answer; {EXPECTED}")
    asked, answer = record["prompt"], record["answer"]
    if not isinstance(asked, (str, list)):
        raise WorkloadError(f"{where} has the prompt {asked!r}; text or token ids were expected: {EXPECTED}")
    prompt = _ids(asked, where, tokenizer)
    spaced = isinstance(asked, str) and not asked.endswith((" ", "\n", "\t"))
    if "choices" not in record:
        text = answer if isinstance(answer, str) else ""
        if not answer or not isinstance(answer, (str, list)):
            raise WorkloadError(f"{where} has the answer {answer!r}; {EXPECTED}")
        if text and not text.strip():
            raise WorkloadError(f"{where} has the answer {answer!r}, which is blank; {EXPECTED}")
        return Task(prompt, answer=_continuation(answer, spaced, where, tokenizer), text=text.strip())
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(choices):
        raise WorkloadError(f"{where} has the choices {choices!r}; two or more were expected")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise WorkloadError(f"{where} has the answer {answer!r}; expected the index of one of {len(choices)} choices")
    return Task(prompt, tuple(_continuation(choice, spaced, where, tokenizer) for choice in choices), answer)


def _continuation(value: Any, spaced: bool, where: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Token ids of text that follows a prompt, without the special tokens that begin a text."""
    if not isinstance(value, (str, list)):
        raise WorkloadError(f"{where} has the choice {value!r}; text or token ids were expected")
    if not isinstance(value, str) or tokenizer is None:
        return _ids(value, where, tokenizer)
    text = f" {value}" if spaced and not value[:1].isspace() else value
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except (TypeError, ValueError, UnicodeError) as error:  # e.g. a lone surrogate
        raise WorkloadError(f"{where}: the tokenizer refuses {value!r} ({error}); Unicode text was expected") from error
    return tuple(ids)


def _ids(value: str | list[Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    try:
        (ids,) = prompts.parse([value], tokenizer)
    except WorkloadError as error:
        raise WorkloadError(f"{where}: {error}") from error
    return ids


def answer(
    variant: Variant, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase | None, pad_token_id: int = 0
) -> tuple[bool, ...]:
    """Whether a variant answers each task correctly.

    A choice is correct if its tokens together are likelier than those of every other choice (lm-evaluation-harness'
    `acc`). An answer is correct if greedy decoding begins with it and no letter or digit follows.

    Raises:
        CandidateError: the variant raised.
    """
    served = Served(variant, pad_token_id)
    return tuple(_chooses(served, t) if t.choices else _answers(served, t, tokenizer) for t in tasks)


def _chooses(served: Served, task: Task) -> bool:
    likely = [_log_likelihood(served, task.prompt, choice) for choice in task.choices]
    return max(range(len(likely)), key=likely.__getitem__) == task.index  # the first if all are NaN


def _log_likelihood(served: Served, prompt: tuple[int, ...], choice: tuple[int, ...]) -> float:
    logits = served.step([prompt], [choice])[0]  # [T, V]
    following = torch.tensor(choice, dtype=torch.int64, device=logits.device)[:, None]
    total = float(logits.log_softmax(-1).gather(-1, following).sum())
    return total if math.isfinite(total) else -math.inf


def _answers(served: Served, task: Task, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    out = served.generate([task.prompt], len(task.answer) + SPARE_TOKENS)[0, len(task.prompt) :].tolist()
    if not task.text or tokenizer is None:
        return tuple(out[: len(task.answer)]) == task.answer
    ends = configured.end_ids(served.variant.original.generation_config)  # what follows one is not the model's answer
    said = str(tokenizer.decode(list(configured.until_end(out, ends)), skip_special_tokens=True)).strip()
    return said.startswith(task.text) and not said[len(task.text) :][:1].isalnum()


def compare(recorded: Suite, right: Sequence[bool], max_loss: float = MAX_LOSS) -> Flips:
    """McNemar's test on the tasks whose outcome changed (Psychometrika, 1947), exact. Pure."""
    both = list(zip(recorded.ids, recorded.right, right, strict=True))
    lost = tuple(name for name, was, now in both if was and not now)
    won = tuple(name for name, was, now in both if now and not was)
    return Flips(
        lost,
        won,
        len(both),
        at_least(len(lost), len(lost) + len(won)),
        *decide(len(lost), len(won), len(both), max_loss),
    )


def decide(lost: int, won: int, total: int, max_loss: float = MAX_LOSS) -> tuple[Verdict, str]:
    """Decide the verdict on changed outcomes. Pure.

    It is FAIL if losses outnumber gains beyond chance. It is PASS if the net loss is at most `max_loss` of all tasks,
    with the 95 % Clopper-Pearson bound of the losses' share among as many changes as were seen. That is said of these
    tasks alone: a model that fails 5 % of all tasks that it could solve changes none of 20 in 36 % of cases.
    """
    changed = lost + won
    figures = f"{lost} lost and {won} won of {total}"
    if not total:
        return Verdict.INCONCLUSIVE, "no tasks"
    if not changed:
        return Verdict.PASS, f"the same tasks are right, all {total}"
    if (p := at_least(lost, changed)) <= ALPHA:
        return Verdict.FAIL, f"{figures}: more than chance (McNemar's exact test, p = {p:.2g})"
    if (worst := (2 * upper_share(lost, changed) - 1) * changed / total) <= max_loss:
        return (
            Verdict.PASS,
            f"{figures}: at most {max(0.0, worst):.1%} lost on balance (McNemar's exact test, p = {p:.2g})",
        )
    fewest = math.ceil(math.log(ALPHA) / math.log(0.5))  # least changes, all of them losses, that the test can detect
    need = f"some {math.ceil(total * fewest / changed)} tasks" if changed < fewest else f"more than {total} tasks"
    return Verdict.INCONCLUSIVE, (
        f"{figures}: up to {worst:.1%} may be lost on balance, over {max_loss:.0%}; {changed} changed outcomes are too"
        f" few to tell (p = {p:.2g}): need {need}"
    )


def at_least(lost: int, changed: int) -> float:
    """Chance of `lost` or more losses among `changed` outcomes, if both directions are equally likely."""
    ways: int = sum(math.comb(changed, k) for k in range(lost, changed + 1))
    return float(ways / 2**changed)


def upper_share(lost: int, changed: int) -> float:
    """Upper 95 % bound of a share, given `lost` of `changed` (Clopper and Pearson, Biometrika, 1934)."""
    low, high = lost / changed, 1.0
    if lost == changed:
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        at_most = sum(math.exp(_log_binomial(k, changed, middle)) for k in range(lost + 1))
        low, high = (middle, high) if at_most > ALPHA else (low, middle)
    return high


def _log_binomial(k: int, n: int, share: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(share) + (n - k) * math.log1p(-share)
