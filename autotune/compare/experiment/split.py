"""Split: a candidate answers a share of live requests, chosen by a stable key. Guardrails and a ramp set the share."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...errors import DeviceError, ExperimentError, RequestError, StateError, VariantError, in_words
from ...machine import forking, outside
from ...model import modes, route, seam
from ...runtime import dispatch
from ...runtime.attempt import Attempt
from ...runtime.batching.terms import seeded
from ...runtime.token_clock import TokenClock
from ...runtime.wrapped import live_request
from ...tune import codec
from . import guardrails, ramp
from .arms import is_same
from .guardrails import STANDARD, Guardrail
from .live import Layer, LiveState, LiveStatus, Record, Standing, log, sentences
from .ramp import Ramp, RampProgress, RampState, rolled_back

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedModel

    from ...runtime.variant import Variant
    from ...validate.timing import Clock
    from .setup import Setup

SAVE_EVERY = 25  # the candidate's requests between two writes to the store; changes of state are written directly
KEPT_ERRORS = 5  # latest error messages that are kept
STATES = {
    RampState.RAMPING: LiveState.RUNNING,
    RampState.FULL: LiveState.FULL,
    RampState.ROLLED_BACK: LiveState.ROLLED_BACK,
}
_KEY: ContextVar[str | None] = ContextVar("autotune_experiment_key", default=None)


class Split(Layer):
    """A candidate on a share of live traffic. Begins when entered or started; the model is unchanged when it ends.

    If the candidate fails on a call, the control answers instead, which costs the caller only time. Tokens that were
    streamed before stay, and the control continues after them. This counts as the candidate's error, and so do NaN
    logits. Errors of the caller's streamers, processors and criteria do not count; they go to the caller. Requests are
    assumed to be independent: if a few keys make up much of the traffic, the intervals are too narrow.

    Several processes may run the same split on one store, each with its own figures. A roll-back in one reaches the
    others when they next save, after at most 25 of the candidate's requests, and a resumption when they next start.

    Args:
        experiment: the experiment with the candidate; its name is the salt of the keys.
        model: the live model, wrapped or not, which is the control.
        candidate: name of the candidate, if the experiment has several.
        ramp: rising shares of requests; every guardrail must hold for a step up.
        guardrails: limits that roll the candidate back. A user's metric is measured in the caller's thread.
        step_requests: least number of the candidate's requests in a step.
        key: returns the key of a call (`seam.Sampling`); default: the one set by `with split.key("user-42"):`, or the
            prompt.
        clock: returns monotonic seconds.

    Raises:
        ExperimentError: the candidate cannot be run, or a setting makes no sense.
    """

    def __init__(
        self,
        experiment: Setup,
        model: PreTrainedModel,
        *,
        candidate: str | None = None,
        ramp: Sequence[float] = (0.01, 0.1, 0.5, 1.0),
        guardrails: Sequence[Guardrail] = STANDARD,
        step_requests: int = 50,
        key: Callable[[seam.Sampling], str] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        names = [candidate] if candidate is not None else list(experiment.candidates)
        if len(names) != 1:
            raise ExperimentError(f"a split has one candidate; choose candidate= from {', '.join(names)}")
        self.name = experiment.name
        self.ramp = Ramp(tuple(ramp), _checked(guardrails), step_requests)
        super().__init__(experiment, model, names)
        self._arm = self._arms[names[0]]
        assert self._arm.variant is not None  # noqa: S101 - `arms_of` refuses others; for the type checker
        self._variant: Variant = self._arm.variant
        self._is_derived = is_same(self._variant.original, model)  # and an edit of the model mixes old and new weights
        self._key = key
        self._clock = clock
        self._lock = forking.lock()
        self._running = False
        self._requests = 0
        self._counts = Counter[str]()
        self._errors = deque[str](maxlen=KEPT_ERRORS)
        rails = [[g.name, g.kind, g.limit, g.worse] for g in self.ramp.rails]
        settings = {"ramp": list(self.ramp.shares), "guardrails": rails}
        self._record = Record(experiment, "split", self._control_arm, self._arms, settings)
        kept = self._record.load(self._arm.name)
        self._progress = _progress(kept) if kept else RampProgress()

    # What users call

    def start(self) -> Self:
        """Begin at the share that an earlier process reached."""
        route.add_layer(self._model, self)
        self._running = True
        self._save()  # and learn what another process has done
        self._save("started", f"{self._arm.name} gets {self.share:.0%} of requests; {'; '.join(self.status_bounds)}")
        return self

    def stop(self) -> None:
        """End. The control answers everything from now on; the measurements are saved."""
        route.remove_layer(self._model, self)
        self._running = False
        self._save()

    @contextmanager
    def key(self, value: str) -> Iterator[None]:
        """Set the key for calls in this context, for example a user, so that the user stays in one arm.

        It applies in this thread or task, not in new threads.

        Raises:
            ExperimentError: the key is not text.
        """
        if not isinstance(value, str):
            raise ExperimentError(f"the key is {value!r}, of type {type(value).__name__}; expected text: str(...)")
        token = _KEY.set(value)
        try:
            yield
        finally:
            _KEY.reset(token)

    def resume(self) -> None:
        """Try the candidate again after a roll-back, from the first step. This never happens automatically.

        Raises:
            StateError: the candidate was not rolled back.
        """
        self._save()  # and learn of another process's roll-back
        with self._lock:
            if self._progress.state is not RampState.ROLLED_BACK:
                raise StateError(f"the split {self.name!r} is {self._progress.state}; there is nothing to resume")
            self._progress = ramp.resumed(self._progress)
        self._save("resumed", f"every step now takes {self.ramp.needed(self._progress)} requests")

    def rollback(self, reason: str = "asked for") -> None:
        """Give the candidate no more requests until `resume` is called."""
        with self._lock:
            self._progress = rolled_back(self._progress, reason)
        self._save(RampState.ROLLED_BACK, reason)

    @property
    def share(self) -> float:
        """Share of requests that the candidate gets now."""
        return self.ramp.share(self._progress)

    @property
    def status_bounds(self) -> tuple[str, ...]:
        """For each guardrail, a sentence with the number of requests in which a clearly worse candidate is caught."""
        return self.ramp.bounds(self._progress)

    @property
    def status(self) -> LiveStatus:
        """The current status; valid however often it is read."""
        with self._lock:
            progress, counts, errors, requests = self._progress, dict(self._counts), tuple(self._errors), self._requests
        verdict, reason = self.ramp.verdict(progress)
        standing = Standing(
            name=self._arm.name,
            description=self._arm.description,
            verdict=verdict.value,
            reason=reason,
            requests=progress.requests,
            share=self.ramp.share(progress),
            findings=sentences(self.ramp.findings(progress)),
            bounds=self.ramp.bounds(progress),
            errors=errors,
        )
        state = STATES[progress.state] if self._running else LiveState.STOPPED
        return LiveStatus(self.name, "split", state, requests, counts, (standing,))

    # What the routed model calls

    def sample(self, call: seam.Sampling) -> Any:
        share = self.share
        try:
            chosen = share > 0 and ramp.place(self.name, self._key_of(call)) < share
        except Exception as error:  # the user's key must not fail a live call
            outside.pass_on(error)
            if self._count("no key could be made") == 1:
                log.warning("no key could be made, so the control answers: %s: %s", type(error).__name__, error)
            return self.control(call)
        if (reason := self._unsupported(call)) is not None:  # such calls would be the control's alone to be timed by
            if chosen:
                self._count(f"bypassed: {reason}")
            return self.control(call)
        return self._candidate(seeded(call)) if chosen else self._timed_control(call)

    def _timed_control(self, call: seam.Sampling) -> Any:
        tokens, start_s = TokenClock(call.streamer, self._clock), self._clock()
        result = self.control(call.with_streamer(tokens))
        self._observe("control", {**self._measured(call, tokens, start_s, result), "errors": 0.0}, "control")
        return result

    def _candidate(self, call: seam.Sampling) -> Any:
        attempt = Attempt(call, self._variant.device)
        tokens, start_s = TokenClock(attempt.call.streamer, self._clock), self._clock()
        try:
            result = self._run(attempt.call.with_streamer(tokens))
        except DeviceError as failure:  # nothing can be retried on this device
            self.rollback(str(failure))
            raise
        except RequestError:  # refused, late or cancelled: the control would not help
            self._count("refused, late or cancelled")
            raise
        except Exception as failure:
            theirs, message = attempt.outsiders(failure), in_words(failure, VariantError)
        else:
            self._observe("candidate", {**self._measured(call, tokens, start_s, result), "errors": 0.0}, "candidate")
            return result
        if theirs is not None:
            raise theirs
        result = attempt.again(self.control)  # if this raises too, the call was at fault
        self._failed(message, "failed, the control answered")
        return result

    def _run(self, call: seam.Sampling) -> Any:
        """Return the candidate's answer, computed with a fresh cache, because the control may need the prepared one."""
        variant = self._variant
        own = call.with_fresh_cache(variant.original).with_processor_before(_refuse_nan)
        with live_request(self._model), variant.device.guard():
            # transformers' loop runs over `front`, which tells failures of the model from those of caller's callbacks
            return dispatch.sample(variant, own) if variant.transforms else own.run_on(variant.front)

    # How it works

    def _key_of(self, call: seam.Sampling) -> str | bytes:
        if self._key is not None:
            return self._key(call)
        if (set_here := _KEY.get()) is not None:
            return set_here
        prompt: bytes = call.input_ids.cpu().numpy().tobytes()
        return prompt

    def _unsupported(self, call: seam.Sampling) -> str | None:
        """Why the candidate cannot answer a call, or None."""
        if reason := modes.unserved():
            return reason
        if call.has_callers_cache():
            return "a cache of the caller's"
        if call.has_embeddings():  # computed by the live model's embedding
            return "argument inputs_embeds"
        if (kind := call.settings.cache_implementation) is not None:
            return f"cache_implementation={kind!r}"
        return dispatch.unsupported(self._variant, call) or (self.change() if self._is_derived else None)

    def _measured(
        self, call: seam.Sampling, tokens: TokenClock, start_s: float, result: Any
    ) -> dict[str, float | None]:
        """Measure an answer: value by guardrail."""
        whole = seam.sequences(result)  # [B, P + N]
        values: dict[str, float | None] = {}
        for rail in self.ramp.rails:
            raw = {"ttft": tokens.ttft_s(start_s), "tpot": tokens.tpot_s}.get(rail.name)
            if rail.measure is not None:
                try:
                    raw = rail.measure(call.input_ids, whole[:, call.input_ids.shape[1] :])
                    values[rail.name] = rail.scale(raw)
                except Exception as error:  # the user's metric must not fail a live call
                    self._count(f"{rail.name} could not be measured")
                    log.warning("guardrail %s could not be measured: %s: %s", rail.name, type(error).__name__, error)
            elif rail.name != "errors":
                values[rail.name] = rail.scale(raw)
        return values

    def _failed(self, message: str, what: str) -> None:
        with self._lock:
            self._errors.append(message)
        log.warning("candidate %s %s: %s", self._arm.name, what, message)
        self._observe("candidate", {"errors": 1.0}, what)

    def _observe(self, arm: Literal["control", "candidate"], values: Mapping[str, float | None], what: str) -> None:
        named = {rail.name: values.get(rail.name) for rail in self.ramp.rails}
        with self._lock:
            self._requests += 1
            self._counts[what] += 1
            before = self._progress
            if before.state is RampState.ROLLED_BACK:  # the call began before the roll-back
                return
            seen = ramp.observed(before, arm, named)
            self._progress = after = seen if arm == "control" else self.ramp.advance(seen)
        if after.state != before.state:
            self._save(after.state, after.reason)
        elif after.step != before.step:
            self._save("step up", f"{self._arm.name} gets {self.share:.0%} of requests: {after.reason}")
        elif arm == "candidate" and after.requests % SAVE_EVERY == 0:
            self._save()

    def _count(self, what: str) -> int:
        with self._lock:
            self._counts[what] += 1
            return self._counts[what]

    def _save(self, kind: str = "", text: str = "") -> None:
        if kind:
            self._record.note(kind, text)
        if kind == RampState.ROLLED_BACK:
            with self._lock:  # another thread may have heard of a resumption since
                self._progress = rolled_back(self._progress, text)
        while later := self._save_unless_behind(self._progress):
            with self._lock:
                is_news = later.turns > self._progress.turns
                if is_news:  # a roll-back now comes after what another process has done, a resumption too
                    self._progress = rolled_back(later, text) if kind == RampState.ROLLED_BACK else later
            if is_news:
                log.warning("split %s: another process has left it %s: %s", self.name, later.state, later.reason)

    def _save_unless_behind(self, own: RampProgress) -> RampProgress | None:
        """Save this progress. Returns that of another process instead, if a later one was saved."""
        later = self._record.save(
            self.status, {self._arm.name: own}, unless=lambda kept: _progress(kept).turns > own.turns
        )
        return _progress(later) if later else None


def _progress(kept: Mapping[str, Any]) -> RampProgress:
    found: RampProgress = codec.decode(RampProgress, kept, "progress")
    return found


def _refuse_nan(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Raise VariantError if the logits are NaN, as a logits processor, before a token is chosen from them."""
    if bool(torch.isnan(scores).any()):
        raise VariantError(f"NaN logits at token {input_ids.shape[1]}")
    return scores


def _checked(given: Sequence[Guardrail]) -> tuple[Guardrail, ...]:
    return guardrails.checked(given)
