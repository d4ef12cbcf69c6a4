"""Requests that are submitted rather than called: each is generated in a thread of its own and streams its tokens."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import QueueFullError, StateError, WorkloadError
from ..machine import bells, ending, forking
from ..model import seam
from ..runtime.batching.terms import CURRENT, LOOK_S, MOST_WAITING, RequestTerms

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from transformers import PreTrainedModel

    from ..errors import RequestError

# The settings by which one sequence is generated and streamed, with the only value that each may have.
SINGLE = {"streamer": None, "num_return_sequences": 1, "num_beams": 1, "return_dict_in_generate": False}


class Submitted:
    """A request under way. Iterate over it, with `for` or `async for`, to get new tokens as they come, as ints.

    As a context manager, with `with` or `async with`, it is cancelled at the end unless it is done.

    Attributes:
        terms: on which it is served.
    """

    never_waits = True  # as a streamer: see `runtime.token_clock.never_waits`

    def __init__(self, terms: RequestTerms) -> None:
        self.terms = terms
        self._tokens = list[int]()
        self._has_prompt = False  # whether `generate` has put the prompt
        self._result: Future[torch.Tensor] = Future()
        self._changed = forking.free(threading.Condition())
        self._listening = list[tuple[bells.Bell, asyncio.Event]]()
        forking.tell(self)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The new tokens so far."""
        return tuple(self._tokens)

    def done(self) -> bool:
        """Whether it was finished, failed or was cancelled."""
        return self._result.done()

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        """Wait for the whole sequence.

        Args:
            timeout_s: seconds to wait at most; the request goes on if they pass.

        Returns:
            ids [1, P + new].

        Raises:
            CancelledRequestError: it was cancelled.
            DeadlineError: its deadline passed. `tokens` holds those that came in time.
            QueueFullError: too many requests wait.
            TimeoutError: `timeout_s` passed.
            Whatever `generate` raises.
        """
        return self._result.result(timeout_s)

    def cancel(self) -> None:
        """Give the request up. Its row is free before the next decode step. Does nothing once it is done."""
        self.terms.cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[int]:
        for shown in itertools.count():
            with self._changed:
                while len(self._tokens) <= shown and not self.done():
                    self._changed.wait()
            if len(self._tokens) <= shown:
                self._result.result()  # raises what ended it early
                return
            yield self._tokens[shown]

    async def __aiter__(self) -> AsyncIterator[int]:
        came = asyncio.Event()
        listener = bells.of_this_loop(), came
        with self._changed:
            self._listening.append(listener)
        try:
            shown = 0
            while True:
                came.clear()
                while shown < len(self._tokens):
                    yield self._tokens[shown]
                    shown += 1
                if self.done() and shown == len(self._tokens):
                    self._result.result()
                    return
                await came.wait()
        finally:
            with self._changed:
                self._listening.remove(listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.cancel()

    def after_fork(self) -> None:
        """End it in a forked child: the thread that serves it is the parent's."""
        if not self.done():
            self.settle(error=StateError("the request was submitted in the process that this one was forked from"))

    # In the thread that serves it

    def violated(self, tokens: int = 0) -> RequestError | None:
        """Why it must not be served any longer, or None.

        Args:
            tokens: new ones so far, for the message; the last of them may not have come here yet.
        """
        return self.terms.violated(time.monotonic(), tokens)

    def put(self, value: torch.Tensor) -> None:
        """Take tokens of any shape, as a streamer. The prompt, which comes first, is not passed on to the caller."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._tokens += value.flatten().tolist()
        self._wake()

    def end(self) -> None: ...

    def settle(self, ids: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        """Set the outcome: the whole sequence [1, P + new], or what was raised."""
        if error is not None:
            self._result.set_exception(error)
        elif ids is not None:
            self._result.set_result(ids)
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            for bell, came in self._listening:
                bell.ring(came)


class _Cut:
    """Ends a request whose terms are violated, where no engine does it. It is asked at each token.

    Args:
        tokens: of the prompt.
    """

    def __init__(self, request: Submitted, tokens: int) -> None:
        self._request = request
        self._prompt_tokens = tokens
        self.error: RequestError | None = None  # why it was ended

    def __call__(self, length: int) -> bool:
        self.error = self._request.violated(length - self._prompt_tokens)
        return self.error is not None


class Submissions:
    """The submitted requests of one model: so many are generated at once, the others wait in the order of their terms.

    Args:
        model: generates.
        at_once: how many requests may be generated at once now.
    """

    def __init__(self, model: PreTrainedModel, at_once: Callable[[], float]) -> None:
        self._model: Any = model
        self._at_once = at_once
        self._changed = forking.free(threading.Condition())
        self._waiting = list[Submitted]()
        self._running = 0
        forking.tell(self)

    def after_fork(self) -> None:
        self._waiting.clear()
        self._running = 0

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return len(self._waiting)

    def submit(self, input_ids: Any, terms: RequestTerms, options: dict[str, Any]) -> Submitted:
        """Begin to generate for one prompt.

        Raises:
            QueueFullError: too many requests wait.
            StateError: the process ends, or no thread can be started.
            WorkloadError: `input_ids` are not the tokens of one prompt, or an option, or the model's own generation
                configuration, does not suit one streamed sequence.
        """
        ids = one_prompt(input_ids)
        for name, suitable in SINGLE.items():
            if (value := self._setting(name, options)) not in (None, suitable):
                raise WorkloadError(
                    f"{name}={value!r}: a submitted request streams one sequence by itself; iterate over what submit "
                    "returns, or call generate"
                )
        request = Submitted(terms)
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                raise QueueFullError(f"{MOST_WAITING} submitted requests wait, and no more may; ask again later")
            self._waiting.append(request)
        serve = partial(self._serve, request, ids, options)
        worker = ending.Worker(serve, "autotune-request", stop=request.cancel, serves=True)
        launched = False
        try:
            launched = worker.launch()
        except ending.NoThreadError as error:
            raise StateError(f"no request can begin: {error}; end other threads, or raise their limit") from error
        finally:
            if not launched:
                with self._changed:
                    self._waiting.remove(request)
        if not launched:
            ending.refuse(StateError("the process ends: no request can begin"))
        return request

    def _setting(self, name: str, options: dict[str, Any]) -> Any:
        """The value that `generate` takes: the option, else the given configuration's, else the model's own."""
        configurations = options.get("generation_config"), self._model.generation_config
        values = options.get(name), *(getattr(each, name, None) for each in configurations)
        return next((value for value in values if value is not None), None)

    def _serve(self, request: Submitted, ids: torch.Tensor, options: dict[str, Any]) -> None:
        try:
            with self._turn(request):
                CURRENT.set(request.terms)
                ids = ids.to(self._model.device)
                cut = _Cut(request, ids.shape[1])
                mask = torch.ones_like(ids)
                found = self._model.generate(ids, **seam.streamed({"attention_mask": mask, **options}, request, cut))
            if cut.error is not None:
                raise cut.error
        except BaseException as error:
            request.settle(error=error)
            if not isinstance(error, Exception):
                raise
        else:
            request.settle(found)

    @contextmanager
    def _turn(self, request: Submitted) -> Iterator[None]:
        """Enclose the generation of a request: wait until it is the next one, and one may begin."""
        try:
            with self._changed:
                while (error := request.violated()) is None and not self._is_next(request):
                    self._changed.wait(LOOK_S)
                if error is not None:
                    raise error
                self._running += 1
                request.terms.begun_s = time.monotonic()  # an engine that has it wait once more says so
        finally:
            with self._changed:
                if request in self._waiting:
                    self._waiting.remove(request)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _is_next(self, request: Submitted) -> bool:
        return self._running < self._at_once() and request is min(self._waiting, key=lambda each: each.terms.order)


def one_prompt(value: Any) -> torch.Tensor:
    """The tokens of one prompt as ids [1, P] int64.

    Args:
        value: token ids: a list, a tensor [P] or a tensor [1, P].

    Raises:
        WorkloadError: it is something else, or empty.
    """
    if isinstance(value, str):
        raise WorkloadError("submit takes token ids, not text; encode it first: tokenizer(text).input_ids")
    try:
        ids = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise WorkloadError(f"submit takes the token ids of one prompt, not {type(value).__name__}") from error
    if ids.is_floating_point() or ids.dtype is torch.bool or ids.dim() not in (1, 2) or not ids.numel():
        raise WorkloadError(f"submit takes the token ids of one prompt, not {ids.dtype} of shape {list(ids.shape)}")
    if ids.dim() == 2 and ids.shape[0] != 1:
        raise WorkloadError(f"submit takes one prompt, not {ids.shape[0]}; submit them one by one")
    return ids.reshape(1, -1).long()
