"""Logits of a variant, collected through the path that will serve it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DeviceError, MeasurementError, in_words
from ..machine import outside
from ..model import route, seam
from ..runtime import dispatch
from ..runtime.variant import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = Sequence[int]


class CandidateError(MeasurementError):
    """The candidate raised while it was being scored or timed; the message contains its exception."""


class OutputError(CandidateError):
    """The candidate ran, but its output is not good enough."""


class BypassedError(CandidateError):
    """The variant leaves this kind of call to the original, so there is nothing to judge."""


class Served(dispatch.Measured):
    """A variant as a wrapped model serves it.

    Args:
        variant: the variant to run.
        pad_token_id: for left padding.
        eos_token_ids: tokens that end a text; none while tokens are forced or counted.
        fall_back: whether the original serves what the variant cannot, as for a user; if not, BypassedError is raised.

    Attributes:
        left: number of groups of an exam that were left to the original, by reason.
    """

    def __init__(
        self, variant: Variant, pad_token_id: int, eos_token_ids: Sequence[int] = (), fall_back: bool = True
    ) -> None:
        super().__init__(variant)
        self.fall_back = fall_back
        self.left: Counter[str] = Counter()
        self.model: PreTrainedModel = route.greedy(route.routed(variant.original, self), pad_token_id, eos_token_ids)
        self.pad_token_id = pad_token_id

    def bypass(self, call: seam.Sampling, reason: str) -> Any:
        if not self.fall_back:
            raise BypassedError(reason)
        return dispatch.sample(Variant(self.variant.original), call)

    def generate(self, prompts: Sequence[Tokens], new_tokens: int, **options: Any) -> torch.Tensor:
        """Generate tokens [B, P + new_tokens] from left-padded `prompts`.

        Raises:
            CandidateError: the variant raised.
        """
        ids, mask = left_padded(prompts, self.pad_token_id, self.model.device)
        model: Any = self.model  # transformers' own types are loose here
        return _attempted(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options))

    def step(self, contexts: Sequence[Tokens], forced: Sequence[Tokens]) -> torch.Tensor:
        """Return next-token logits [B, T, V] (float32) of decoding after `contexts`, with forced tokens [B, T].

        Raises:
            OutputError: the variant stopped early, changed its logits' shape, or did not follow the forced tokens.
            CandidateError: the variant raised.
        """
        teacher = _Teacher(torch.tensor(forced, dtype=torch.int64, device=self.model.device))
        out = self.generate(contexts, teacher.steps, logits_processor=[teacher])
        if teacher.logits is None or teacher.seen != teacher.steps:
            raise OutputError(f"decoding stopped after {teacher.seen} of {teacher.steps} tokens")
        if not torch.equal(out[:, -teacher.steps :], teacher.forced):
            raise OutputError("decoding did not emit the tokens that the logits processor chose")
        return teacher.logits

    def read(self, ids: Tokens, last: int) -> torch.Tensor:
        """Return logits [last, V] at the last positions of one direct forward over `ids`.

        Raises:
            CandidateError: the variant raised.
        """
        model: Any = self.model
        keep = seam.last_logits(model, last)

        def logits() -> torch.Tensor:
            with torch.no_grad():
                given = torch.tensor([ids], dtype=torch.int64, device=model.device)
                return seam.logits(model(input_ids=given, **keep))

        return _attempted(logits)[0, -last:]

    def read_together(self, texts: Sequence[Tokens], last: int) -> torch.Tensor:
        """Return logits [B, last, V] at the last positions of left-padded texts, from one forward of prefill's module.

        The texts are passed to generate as a prompt, so that it sets masks and positions for the padding.

        Raises:
            CandidateError: the model raised.
        """
        reader = _Reader(self.variant, last)
        ids, mask = left_padded(texts, self.pad_token_id, self.model.device)
        model: Any = route.greedy(route.routed(self.variant.original, reader), self.pad_token_id)
        with self.variant.turn():
            _attempted(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=1))
        return reader.logits


def _attempted(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the result of `run`.

    Raises:
        CandidateError: `run` raised.
    """
    try:
        return run()
    except (OutputError, BypassedError, DeviceError):
        raise
    except Exception as error:
        outside.pass_on(error)
        failure = in_words(error)
    raise CandidateError(failure)  # outside the handler: its traceback would keep the candidate's tensors alive


class _Reader(route.Plain):
    """A router that keeps the logits of a prompt's last tokens."""

    logits: torch.Tensor  # [B, last, V]

    def __init__(self, variant: Variant, last: int) -> None:
        self.variant = variant
        self.last = last

    def sample(self, call: seam.Sampling) -> Any:
        return call.run_on(route.routed(call.model, self))

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = kwargs | seam.last_logits(model, self.last)
        if not self.variant.transforms:
            out: Any = seam.bare_class(model).forward(model, *args, **asked)
        else:
            with self.variant.running("prefill") as module:
                out = module(*args, **asked)
        self.logits = seam.logits(out)[:, -self.last :]
        return out


class _Teacher:
    """A logits processor that keeps the raw scores and forces the next token."""

    def __init__(self, forced: torch.Tensor) -> None:
        self.forced = forced  # [B, T]
        self.logits: torch.Tensor | None = None  # [B, T, V]; the first `seen` steps are filled
        self.seen = 0

    @property
    def steps(self) -> int:
        return self.forced.shape[1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows, width = scores.shape
        if self.logits is None:
            self.logits = scores.new_empty(rows, self.steps, width, dtype=torch.float32)
        if scores.shape != self.logits[:, 0].shape:
            raise OutputError(f"logits of shape {list(scores.shape)}, expected {list(self.logits[:, 0].shape)}")
        target = self.forced[:, self.seen : self.seen + 1]
        self.logits[:, self.seen] = scores.detach()  # a copy: a CUDA graph overwrites its output buffer
        self.seen += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, target, 0.0)


def left_padded(prompts: Sequence[Tokens], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of left-padded prompts, both [B, P]."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    rows, seen = (torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (ids, mask))
    return rows, seen
