"""A plan that fails while it serves: the original's answer is the plain model's, and nobody is asked twice."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import autotune
from autotune import transforms
from autotune.errors import TransformError
from autotune.model import seam
from autotune.runtime import kernels
from autotune.runtime.attempt import Attempt
from autotune.runtime.cache import pool
from autotune.runtime.cache.slots import SlotCache
from autotune.runtime.variant import Transform
from tests.fakes.cuda import FakeCuda
from tests.live.test_wrap import scripted, wrapped  # noqa: F401 - a fixture
from tests.machine.test_outside import LateError, alarm, busy, ring
from tests.models import left_padded, tiny, token_prompts

IDS, MANY = torch.tensor(token_prompts(1)), torch.tensor(token_prompts(3))
PLANS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "lean": [("lean_loop", {}, "both")],
    "slots": [("static_cache", {}, "decode")],
    "edited": [("weight_storage", {"dtype": "float16"}, "decode")],  # in transformers' own loop
}
CALLS: dict[str, dict[str, Any]] = {
    "ids": {"inputs": IDS},
    "padded": dict(left_padded()),
    "sampled": {"inputs": MANY, "do_sample": True, "top_k": 20},
    "scores": {"inputs": IDS, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "stops": {"inputs": MANY, "eos_token_id": list(range(3, 60))},
}
no_kernels = kernels.available()
NAMES = [
    "lean",
    "slots",
    pytest.param("edited", marks=pytest.mark.skipif(no_kernels is not None, reason=str(no_kernels))),
]
FAILURES = [("prefill", 0), ("decode", 0), ("decode", 3)]
pytestmark = pytest.mark.filterwarnings("ignore:autotune:RuntimeWarning")


def plan(name: str) -> list[Transform]:
    return [transforms.make(*each) for each in PLANS[name]]


def broken(module: Any, good: int, error: type[Exception] = RuntimeError) -> None:
    """The module raises from its call number `good` on."""
    forward, calls = module.forward, iter(range(1000))

    def fails(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= good:
            raise error("no such kernel")
        return forward(*args, **kwargs)

    module.forward = fails


def failing(name: str, phase: Any, good: int, model: str = "llama") -> Any:
    """A wrapped model whose plan fails."""
    served = wrapped(tiny(model))
    broken(served.autotune._serving.active.edit(phase)[0], good)
    return served


def answer(model: Any, **call: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        return model.generate(**{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **call})


def plainly(result: Any) -> Any:
    """Tokens, scores and logits as lists."""
    if isinstance(result, torch.Tensor):
        return result.tolist()
    return result.sequences.tolist(), *(torch.stack(each).tolist() for each in (result.scores, result.logits))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("phase", "good"), FAILURES)
@pytest.mark.parametrize("name", NAMES)
def test_the_original_answers_from_a_clean_state(
    scripted: list[Transform],  # noqa: F811
    name: str,
    phase: str,
    good: int,
    call: dict[str, Any],
) -> None:
    scripted[:] = plan(name)
    model = failing(name, phase, good)
    assert plainly(answer(model, **call)) == plainly(answer(tiny("llama"), **call))
    assert model.autotune.status.state == "failed"
    assert model.autotune.status.served == 0


@pytest.mark.parametrize(("phase", "good"), FAILURES)
def test_a_state_space_model_starts_afresh(scripted: list[Transform], phase: str, good: int) -> None:  # noqa: F811
    scripted[:] = plan("lean")
    model = failing("lean", phase, good, "mamba")
    assert answer(model, inputs=IDS).tolist() == answer(tiny("mamba"), inputs=IDS).tolist()
    assert model.autotune.status.state == "failed"


class Streamer:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ends += 1


class Counting(LogitsProcessor):
    """Allows one token at each step, the next one of the alphabet each time that it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([10 + self.asked]), 0.0)


class Patient(StoppingCriteria):
    """Ends everything once it was asked six times."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.asked += 1
        return torch.full((ids.shape[0],), self.asked >= 6, dtype=torch.bool)


@pytest.mark.fault("E68")
@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("phase", "good"), FAILURES)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_streamed_stands_and_is_continued(
    scripted: list[Transform],  # noqa: F811
    name: str,
    phase: str,
    good: int,
    options: dict[str, Any],
) -> None:
    scripted[:] = plan(name)
    model, streamer = failing(name, phase, good), Streamer()
    result = answer(model, inputs=IDS, streamer=streamer, **options)
    assert streamer.seen == result[0].tolist()
    assert streamer.ends == 1
    assert result.tolist() == answer(tiny("llama"), inputs=IDS, **options).tolist()


def test_streamed_tokens_that_the_original_would_not_have_chosen_stand(scripted: list[Transform]) -> None:  # noqa: F811
    scripted[:] = plan("lean")
    model, streamer = wrapped(tiny("llama")), Streamer()
    (module,) = model.autotune._serving.active.edit("both")
    module.lm_head = torch.nn.Linear(64, 256, bias=False)  # another answer
    broken(module, 4)
    result = answer(
        model, inputs=IDS, streamer=streamer, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert streamer.seen == result.sequences[0].tolist()
    plain = tiny("llama")
    for at in range(12, 20):
        chosen = result.sequences[0, at]
        if at < 16:
            assert chosen == result.scores[at - 12].argmax()  # the plan's
        else:
            assert chosen == plain(result.sequences[:, :at]).logits[0, -1].argmax()
    assert result.sequences[0, 12:16].tolist() != answer(plain, inputs=IDS)[0, 12:16].tolist()


@pytest.mark.parametrize(("phase", "good"), FAILURES)
@pytest.mark.parametrize("name", NAMES)
def test_processors_and_criteria_of_the_callers_are_asked_once_a_token(
    scripted: list[Transform],  # noqa: F811
    name: str,
    phase: str,
    good: int,
) -> None:
    scripted[:] = plan(name)
    results = []
    for model in (failing(name, phase, good), tiny("llama")):
        processor, criterion = Counting(), Patient()
        options = {"logits_processor": [processor], "stopping_criteria": [criterion]}
        results.append((answer(model, inputs=MANY, **options).tolist(), processor.asked, criterion.asked))
    assert results[0] == results[1]
    assert results[0][1:] == (6, 6)


def test_tokens_that_an_engine_knows_on_the_host_are_repeated_on_the_device() -> None:
    """The scores that they are scattered into are there."""
    held = torch.tensor([[1, 2, 3, 4]])
    options = {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()}
    call = seam.Sampling(tiny("llama"), held[:, :2].to("meta"), options | {"generation_config": GenerationConfig()}, {})
    attempt = Attempt(call, FakeCuda())
    attempt.call.criteria.told = SimpleNamespace(ids=held)
    tokens = attempt._tokens()
    assert (tokens.device, tokens.shape) == (torch.device("meta"), (1, 2))


FORWARDS: dict[str, dict[str, Any]] = {
    "token out of range": {"input_ids": torch.tensor([[5, 10_000]])},
    "mask of another width": {"input_ids": MANY, "attention_mask": torch.ones(3, 5, dtype=torch.long)},
    "ids of floats": {"input_ids": MANY.float()},
    "one dimension": {"input_ids": MANY[0]},
    "nothing": {},
    "empty": {"input_ids": MANY[:, :0]},
    "labels of another shape": {"input_ids": MANY, "labels": MANY[:, :3]},
}


@pytest.mark.parametrize("given", FORWARDS.values(), ids=FORWARDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_forward_raises_what_the_original_raises(scripted: list[Transform], name: str, given: Any) -> None:  # noqa: F811
    scripted[:] = plan(name)
    found = []
    model = wrapped(tiny("llama"))
    for each in (tiny("llama"), model):
        try:
            with torch.no_grad():
                each(**given)
            found.append("answered")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    assert found[0] == found[1]
    assert model.autotune.status.state == "tuned"


def test_a_plan_that_fails_in_forward_is_replaced(scripted: list[Transform]) -> None:  # noqa: F811
    scripted[:] = plan("lean")
    model = failing("lean", "prefill", 0)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="no such kernel"):
        found = model(IDS).logits
    assert model.autotune.status.state == "failed"
    with torch.no_grad():
        assert torch.equal(found, tiny("llama")(IDS).logits)
        assert torch.equal(model(IDS).logits, found)


def refused(*_: Any, **__: Any) -> Any:
    raise TransformError("a step that cannot be recorded")


def no_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError("no room for the slots")


@pytest.mark.parametrize("spoil", [refused, no_memory])
def test_a_batch_that_cannot_be_prepared_for_is_the_originals(
    scripted: list[Transform],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., Any],
) -> None:
    scripted[:] = plan("slots")
    model = wrapped(tiny("llama"))
    now = [0.0]
    watch = model.autotune._serving.watch
    watch.clock = lambda: now[0]
    plain = tiny("llama")
    answer(model, inputs=IDS)
    made = []
    monkeypatch.setattr(pool, "SlotCache", lambda *args: (made.append(args), spoil(*args)))
    with pytest.warns(RuntimeWarning, match=f"a batch of 3 cannot be decoded: .*{spoil.__name__[:2]}"):
        assert answer(model, inputs=MANY).tolist() == answer(plain, inputs=MANY).tolist()
    tries = len(made)
    assert answer(model, inputs=MANY).tolist() == answer(plain, inputs=MANY).tolist()
    assert len(made) == tries > 0  # not tried again at once
    monkeypatch.setattr(pool, "SlotCache", SlotCache)
    answer(model, inputs=IDS)
    assert model.autotune.status.state == "tuned"
    assert model.autotune.status.served == 2
    now[0] += watch.rules.pause_s
    assert answer(model, inputs=MANY).tolist() == answer(plain, inputs=MANY).tolist()
    assert model.autotune.status.served == 3
    assert sum(model.autotune.status.bypassed.values()) == 2


@pytest.mark.parametrize("way", ["generate", "forward"])
def test_an_alarm_while_the_plan_serves_reaches_the_caller(scripted: list[Transform], way: str) -> None:  # noqa: F811
    scripted[:] = plan("lean")
    model = wrapped(tiny("llama"))
    (module,) = model.autotune._serving.active.edit("prefill")
    module.forward = lambda *_, **__: busy()
    with pytest.raises(LateError, match="too late"), alarm(ring), torch.no_grad():
        model.generate(IDS, max_new_tokens=2) if way == "generate" else model(IDS)
    assert model.autotune.status.state == "tuned"
    assert autotune.VariantError.__name__ not in str(model.autotune.events)
