"""One call of generate's loop that can be answered twice: by a plan and, if the plan fails, by the original.

The second answer starts from a clean state: a new cache, the same random numbers, and a streamer that has seen nothing.
But tokens that the caller has seen are final. They have reached a streamer, or a processor or criterion that may
remember them. The original is forced to repeat these tokens and continues after them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..machine import outside
from ..model import seam
from .token_clock import never_waits

if TYPE_CHECKING:
    from ..machine.device import Device
    from ..model.seam import Sampling

T = TypeVar("T")


class Attempt:
    """A record of what the objects that came with a call (streamer, processors, criteria) see and raise.

    Args:
        call: the call as it came.
        device: the device that computes it.

    Attributes:
        call: the same call, with its objects observed. The plan, which may fail, serves this one.
    """

    def __init__(self, call: Sampling, device: Device) -> None:
        self._given = call
        self._device = device
        self._random = device.random_state()
        self._raised: BaseException | None = None  # an exception from the caller's own objects
        self._shown = 0  # tokens of a sequence that the streamer has seen
        self._ended = False  # whether the streamer's `end` was called
        self._chosen: torch.Tensor | None = None  # [B, P + T], up to the latest token that the criteria were asked of
        self._done: list[Any] = []  # results of the criteria for each of the T tokens, [B] each
        self._scores: list[torch.Tensor] | None = [] if _returns_scores(call) else None  # [B, V] for each token
        self._latest: torch.Tensor | None = None
        self.call = call.through(self._process, self._stop, is_transparent=not _returns_scores(call))
        if call.streamer is not None:
            self.call = self.call.with_streamer(_Streamer(self))

    def outsiders(self, error: BaseException) -> BaseException | None:
        """The caller's own exception, if one caused `error`, else None.

        An object that came with the call raised it, or it came from outside (a signal handler, another thread).
        """
        return self._raised if self._raised is not None else outside.delivered(error, depth=2)

    def again(self, answer: Callable[[Sampling], Any], *, always: bool = False) -> Any:
        """Answer the call again with `answer`, from a clean state.

        Args:
            answer: answers a call.
            always: whether tokens are repeated that nobody has seen, too.

        Raises:
            BaseException: any exception of `answer`.
        """
        call = self._given.with_fresh_cache(self._given.model)
        self._device.set_random_state(self._random)
        chosen, kept = self._tokens(), self._scores
        if not chosen.shape[1] or not (always or self._shown or seam.remembers(call)):
            return answer(call)
        told = chosen.shape[1]
        call = call.through(_Led(chosen).scores, _Led(self._done).take if self._done else None)
        if call.streamer is not None:
            call = call.with_streamer(_Streamer(self, unseen=-self._shown))
        result = answer(call)
        if kept is not None:
            result.scores = (*kept[:told], *result.scores[told:])
        return result

    def _tokens(self) -> torch.Tensor:
        """The tokens that were chosen, [B, T], on the call's device. An engine knows them on the host."""
        given, knows = self._given.input_ids, self.call.criteria.told
        ids = self._chosen if knows is None else knows.ids
        return given[:, :0] if ids is None else ids[:, given.shape[1] :].to(given.device)

    def _process(self, processors: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        scores = self.run(processors, *args, **kwargs)
        self._latest = scores
        return scores

    def _stop(self, criteria: Callable[..., Any], ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        done = self.run(criteria, ids, *args, **kwargs)
        self._done.append(done)
        self._chosen = ids
        if self._scores is not None and self._latest is not None:
            self._scores.append(self._latest)
        return done

    def run(self, theirs: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call one of the caller's objects, and record an exception from it as the caller's own."""
        try:
            return theirs(*args, **kwargs)
        except BaseException as error:
            self._raised = error
            raise

    @property
    def streams_at_once(self) -> bool:
        """Whether the caller's streamer never waits."""
        return never_waits(self._given.streamer)

    def show(self, value: Any) -> None:
        self.run(self._given.streamer.put, value)
        self._shown += 1

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self.run(self._given.streamer.end)


class _Streamer:
    """A streamer that passes tokens to the caller's. If that has seen n tokens already, `unseen` starts at -n."""

    def __init__(self, attempt: Attempt, unseen: int = 0) -> None:
        self._attempt = attempt
        self._unseen = unseen
        self.never_waits = attempt.streams_at_once

    def put(self, value: Any) -> None:
        self._unseen += 1
        if self._unseen > 0:
            self._attempt.show(value)

    def end(self) -> None:
        self._attempt.end()


class _Led:
    """A replacement for processors or criteria over the first T tokens, whose results are known; then it calls them.

    Args:
        known: the chosen tokens [B, T], or a list of the criteria's results for each of the T tokens.
    """

    def __init__(self, known: Any) -> None:
        self._known = known
        self._at = 0

    def scores(self, processors: Callable[..., torch.Tensor], ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] that allow only the known token."""
        if self._at == self._known.shape[1]:
            return processors(ids, scores)
        token = self._known[:, self._at, None]
        self._at += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def take(self, criteria: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._at == len(self._known):
            return criteria(*args, **kwargs)
        self._at += 1
        return self._known[self._at - 1]


def _returns_scores(call: Sampling) -> bool:
    return bool(call.settings.return_dict_in_generate and call.settings.output_scores)
