"""Replays a live request off the path, on the control and on a candidate, while no live request is served."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import MeasurementError
from ...model import configured, seam
from ...runtime import dispatch
from ...validate.divergence import compare_logits, find_defect
from ...validate.score import BypassedError, CandidateError, OutputError, Served, Tokens
from ...validate.timing import TIMED_TOKENS, Clock, Pair, Timing, time_request

if TYPE_CHECKING:
    from ...runtime.traffic import Traffic
    from ...runtime.variant import Variant

SCORED_TOKENS = 16  # first tokens of an answer whose distributions are compared


class LateError(OutputError):
    """The replay took longer than its deadline."""


class Turns:
    """A clock and a streamer that let live requests go first before every token. Their time is not counted.

    A live request never waits for a replay. If it arrives in the middle of a token, it runs beside the rest of it.

    Args:
        traffic: the live requests.
        until_s: deadline, on `clock`.
        clock: returns monotonic seconds.
    """

    def __init__(self, traffic: Traffic, until_s: float, clock: Clock = time.perf_counter) -> None:
        self._traffic = traffic
        self._until_s = until_s
        self._clock = clock
        self._waited_s = 0.0

    def __call__(self) -> float:
        """Return seconds without those in which live requests were served.

        Raises:
            LateError: the deadline has passed.
            Cancelled: replaying was called off.
        """
        start = self._clock()
        with self._traffic.step():
            pass
        now = self._clock()
        if now > self._until_s:
            raise LateError("its deadline passed")
        self._waited_s += now - start
        return now - self._waited_s

    def put(self, _value: Any) -> None:
        self()

    def end(self) -> None: ...


class Rerun(Served):
    """A variant that answers live requests again and lets live requests go first."""

    def __init__(self, variant: Variant, turns: Turns, pad_token_id: int) -> None:
        super().__init__(variant, pad_token_id, fall_back=False)
        self._turns = turns

    def sample(self, call: seam.Sampling) -> Any:
        if reason := dispatch.unsupported(self.variant, call):
            raise BypassedError(reason)
        return dispatch.sample(
            self.variant, call
        )  # without `turn`: a candidate that hangs must not hold up live requests

    def forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return dispatch.forward(self.variant, model, args, kwargs)

    def generate(self, prompts: Sequence[Tokens], new_tokens: int, **options: Any) -> torch.Tensor:
        return super().generate(prompts, new_tokens, **{"streamer": self._turns, **options})


@dataclass(frozen=True)
class ReplayedRequest:
    """A live request and its answer.

    Args:
        ids: [B, P] int64.
        mask: [B, P], or None.
        answer: [B, N] int64, the new tokens.
        ends: token ids that end an answer.
        pad_token_id: token id for left padding.
        at_s: when it was answered, on the experiment's clock, seconds.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    answer: torch.Tensor
    ends: tuple[int, ...]
    pad_token_id: int
    at_s: float

    @classmethod
    def of(cls, call: seam.Sampling, result: Any, now_s: float) -> ReplayedRequest:
        """Copy a call and its answer, because the caller may change its tensors."""
        config, whole = call.settings, seam.sequences(result)  # [B, P + N]
        ended, mask = configured.end_ids(config), call.mask
        return cls(
            ids=call.input_ids.clone(),
            mask=None if mask is None else mask.clone(),
            answer=whole[:, call.input_ids.shape[1] :].clone(),
            ends=ended,
            pad_token_id=config.pad_token_id if isinstance(config.pad_token_id, int) else (ended or (0,))[0],
            at_s=now_s,
        )

    def prompts(self) -> list[list[int]]:
        """Token ids without padding."""
        mask = torch.ones_like(self.ids) if self.mask is None else self.mask
        return [row[keep.bool()].tolist() for row, keep in zip(self.ids, mask, strict=True)]

    def served(self) -> list[list[int]]:
        """New tokens [B][N], up to where the shortest answer ended."""
        rows = self.answer.tolist()
        lengths = [next((n + 1 for n, token in enumerate(row) if token in self.ends), len(row)) for row in rows]
        return [row[: min(lengths)] for row in rows]


@dataclass(frozen=True)
class Replay:
    """The result of one request on one candidate.

    Args:
        tokens: number of tokens of every sequence that were compared.
        diverged: index of the first token for which the candidate's choice differs from the control's; None if none.
        kld: mean KL(control || candidate) over these tokens, nats; NaN if the candidate failed.
        pair: both timings, for the same forced number of tokens; None if the candidate failed.
        error: how the candidate failed, or None.
        left: why the candidate leaves such a request to the control, which says nothing about it, or None.
    """

    tokens: int = 0
    diverged: int | None = None
    kld: float = float("nan")
    pair: Pair | None = None
    error: str | None = None
    left: str | None = None


def replay(
    control: Rerun, candidate: Rerun, request: ReplayedRequest, turns: Turns, *, candidate_first: bool
) -> Replay:
    """Run a request again on both arms, time it, and score it on the tokens that were served.

    All decoding is greedy, even if the live call sampled, so the process's random numbers are not used.

    Raises:
        LateError: the deadline passed.
        MeasurementError: the control itself cannot replay the request.
        Cancelled: replaying was called off.
    """
    prompts, served = request.prompts(), request.served()
    count, scored = min(len(served[0]), TIMED_TOKENS), [row[:SCORED_TOKENS] for row in served]
    timings: dict[Rerun, Timing] = {}
    missing: Replay | None = None
    for arm in (candidate, control) if candidate_first else (control, candidate):
        try:
            timings[arm] = time_request(arm, prompts, count, turns)
        except LateError:
            raise
        except CandidateError as error:
            if arm is control:
                raise MeasurementError(f"the control cannot replay this: {error}") from error
            missing = _missing(error)
    if missing is not None:  # and the control can
        return missing
    pair = Pair(timings[control], timings[candidate])
    reference = control.step(prompts, scored)  # [B, T, V]
    try:
        found = candidate.step(prompts, scored)
    except LateError:
        raise
    except CandidateError as error:
        return _missing(error)
    if defect := find_defect(reference, found):
        return Replay(error=defect)
    targets = torch.tensor(scored, dtype=torch.int64, device=reference.device)
    there = compare_logits(reference.flatten(0, 1), found.flatten(0, 1), targets.flatten())
    gaps = there.top_gap.reshape(targets.shape).max(axis=0)  # [T], the largest of any sequence
    diverged = next((n for n, gap in enumerate(gaps) if gap > 0), None)
    return Replay(len(scored[0]), diverged, float(there.kld.mean()), pair)


def _missing(error: CandidateError) -> Replay:
    return Replay(left=str(error)) if isinstance(error, BypassedError) else Replay(error=str(error))
