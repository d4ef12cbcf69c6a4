"""A routed model is still the model: every way of calling it gives what the unrouted model gives."""

from __future__ import annotations

import copy
import pickle
import pickletools
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from autotune.errors import MeasurementError
from autotune.model import route, seam
from autotune.runtime import dispatch
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Stage, Transform, Variant
from tests.models import ARCHITECTURES, left_padded, tiny, token_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fork(Transform):
    """Gives the phase a twin of its own and changes nothing in it."""

    name: ClassVar[str] = "fork"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "a twin, unchanged"

    def apply(self, variant: Variant) -> None:
        variant.edit(self.phase)


VARIANTS: dict[str, tuple[Transform, ...]] = {
    "identity": (),
    "both": (Fork("both"),),
    "decode": (Fork("decode"),),
    "prefill": (Fork("prefill"),),
    "apart": (Fork("prefill"), Fork("decode")),
}


class Door:
    """A router that lets a variant serve what it can, and the original the rest."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.bypassed: list[str] = []

    def sample(self, call: seam.Sampling) -> Any:
        if reason := dispatch.unsupported(self.variant, call):
            self.bypassed.append(reason)
            return call.original()
        return dispatch.sample(self.variant, call)

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return dispatch.forward(self.variant, model, args, kwargs)

    def other_loop(self, name: str) -> Any:
        self.bypassed.append(name)
        return nullcontext()


def served(model: PreTrainedModel, variant: str) -> PreTrainedModel:
    return route.routed(model, Door(Variant(model).with_transforms(VARIANTS[variant])))


class BanToken(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] = -float("inf")
        return scores


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


PROMPT = torch.tensor(token_prompts(1))  # [1, 12]
GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no mask": {"input_ids": PROMPT},
    "left padding": left_padded(),
    "temperature": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.1},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "logits processor": {"logits_processor": LogitsProcessorList([BanToken(5), BanToken(77)])},
    "stopping criterion": {"stopping_criteria": StoppingCriteriaList([StopAfter(15)])},
    "minimum length": {"min_new_tokens": 10},
    "as a dictionary": {"return_dict_in_generate": True},
    "with scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "hidden states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "several per prompt": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams per prompt": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"input_ids": PROMPT, "prompt_lookup_num_tokens": 2},
    "static cache": {"cache_implementation": "static"},
    "without a cache": {"use_cache": False},
    "one token": {"max_new_tokens": 1},
}


def generate(model: PreTrainedModel, /, **changes: Any) -> Any:
    inputs = changes if "input_ids" in changes else left_padded((12, 12, 12)) | changes
    torch.manual_seed(11)
    return model.generate(**{"max_new_tokens": 12} | inputs)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=where or None)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")


@pytest.mark.parametrize("variant", ["identity", "apart"])
@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE.keys())
def test_generate_gives_what_the_original_gives(llama: PreTrainedModel, variant: str, options: dict[str, Any]) -> None:
    expected = generate(llama, **options)
    assert_same(generate(served(llama, variant), **options), expected)


@pytest.mark.fault("C51")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_split_of_the_phases_serves_a_padded_batch(llama: PreTrainedModel, variant: str) -> None:
    assert_same(generate(served(llama, variant), **left_padded()), generate(llama, **left_padded()))


@pytest.mark.parametrize("variant", ["identity", "apart"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_generates_through_a_route(name: str, variant: str) -> None:
    model = tiny(name)
    for inputs in ({"input_ids": PROMPT}, left_padded()):
        assert_same(generate(served(model, variant), **inputs), generate(model, **inputs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unknown_argument_raises_what_the_original_raises(llama: PreTrainedModel, variant: str) -> None:
    with pytest.raises(ValueError, match="no_such_argument") as expected:
        generate(llama, no_such_argument=1)
    with pytest.raises(expected.type) as raised:
        generate(served(llama, variant), no_such_argument=1)
    assert str(raised.value) == str(expected.value)


BYPASSED = {
    "hidden states": "argument output_hidden_states",
    "beams": "_beam_search",
    "beams per prompt": "_beam_search",
    "prompt lookup": "_assisted_decoding",
    "static cache": "cache_implementation='static'",
    "without a cache": "use_cache=False",
}


@pytest.mark.parametrize("name", GENERATE)
def test_only_what_a_variant_cannot_serve_is_bypassed(llama: PreTrainedModel, name: str) -> None:
    door = Door(Variant(llama).with_transforms((Fork("both"),)))
    generate(route.routed(llama, door), **GENERATE[name])
    assert door.bypassed == ([BYPASSED[name]] if name in BYPASSED else [])


def test_measuring_refuses_what_would_be_bypassed(llama: PreTrainedModel) -> None:
    with pytest.raises(MeasurementError, match="use_cache=False"):
        generate(serving(Variant(llama).with_transforms((Fork("both"),))), use_cache=False)


FORWARD: dict[str, dict[str, Any]] = {
    "logits": {},
    "mask": {"attention_mask": torch.ones_like(PROMPT)},
    "labels": {"labels": PROMPT},
    "last logits": {"logits_to_keep": 1},
    "tuple": {"return_dict": False},
    "hidden states": {"output_hidden_states": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", FORWARD.values(), ids=FORWARD.keys())
def test_forward_gives_what_the_original_gives(llama: PreTrainedModel, variant: str, options: dict[str, Any]) -> None:
    routed = served(llama, variant)
    with torch.no_grad():
        expected, got = llama(PROMPT, **options), routed(PROMPT, **options)
    for name in ("loss", "logits", "hidden_states"):
        assert_same(getattr(got, name, None), getattr(expected, name, None), name)
    assert isinstance(got, type(expected))


@pytest.mark.parametrize("variant", ["identity", "apart"])
def test_a_users_own_loop_over_forward(llama: PreTrainedModel, variant: str) -> None:
    def decode(model: PreTrainedModel) -> list[int]:
        cache, ids, tokens = DynamicCache(config=model.config), PROMPT, []
        with torch.no_grad():
            for _ in range(10):
                logits = model(ids, **seam.over(model, cache)).logits  # [1, S, V]
                ids = logits[:, -1:].argmax(-1)
                tokens.append(int(ids))
        return tokens

    assert decode(served(llama, variant)) == decode(llama)


@pytest.mark.parametrize("variant", ["identity", "apart"])
def test_a_cache_that_generate_returned_can_be_continued(llama: PreTrainedModel, variant: str) -> None:
    def two_turns(model: PreTrainedModel) -> torch.Tensor:
        first = model.generate(input_ids=PROMPT, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True)
        return model.generate(input_ids=first.sequences, **seam.over(model, seam.cache_in(first)), max_new_tokens=5)

    assert_same(two_turns(served(llama, variant)), two_turns(llama))


@pytest.mark.parametrize("variant", ["identity", "apart"])
def test_gradients_flow_through_the_original(variant: str) -> None:
    model = tiny().requires_grad_(True)
    served(model, variant)(PROMPT, labels=PROMPT).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", ["identity", "apart"])
def test_pipeline(llama: PreTrainedModel, tokenizer: Any, variant: str) -> None:
    def complete(model: PreTrainedModel) -> Any:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return generator(["Once upon", "A"], max_new_tokens=8, do_sample=False, batch_size=2)

    assert complete(served(llama, variant)) == complete(llama)


@pytest.mark.fault("C54")
@pytest.mark.parametrize("variant", ["identity", "apart"])
def test_streaming_from_a_thread(llama: PreTrainedModel, tokenizer: Any, variant: str) -> None:
    def stream(model: PreTrainedModel) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        inputs = {"input_ids": PROMPT, "max_new_tokens": 8, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=inputs)
        thread.start()
        pieces = list(streamer)
        thread.join()
        return pieces

    assert stream(served(llama, variant)) == stream(llama)


class Recorder:
    """A router that serves the original and writes down what it was asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def sample(self, call: seam.Sampling) -> Any:
        self.seen.append("sample")
        return call.original()

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.append("forward")
        return seam.bare_class(model).forward(model, *args, **kwargs)

    def other_loop(self, name: str) -> Any:
        self.seen.append(name)
        return nullcontext()


SEEN: dict[str, tuple[Callable[[PreTrainedModel], Any], list[str]]] = {
    "generate": (lambda m: generate(m), ["sample"]),
    "forward": (lambda m: m(PROMPT), ["forward"]),
    "beams": (lambda m: generate(m, num_beams=2), ["_beam_search"]),
    "prompt lookup": (lambda m: generate(m, input_ids=PROMPT, prompt_lookup_num_tokens=2), ["_assisted_decoding"]),
}


@pytest.mark.parametrize(("call", "seen"), SEEN.values(), ids=SEEN.keys())
def test_what_a_router_hears(llama: PreTrainedModel, call: Callable[..., Any], seen: list[str]) -> None:
    router = Recorder()
    route.attach(llama, router)
    call(llama)
    assert router.seen == seen


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=["sampling", "assisted"])
def test_a_forward_that_generate_compiled_is_compiled_once(
    llama: PreTrainedModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, generate compiles on accelerators alone, for caches of a fixed size."""
    made: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda call, **settings: made.append(call) or call)
    monkeypatch.setattr(type(llama), "_valid_auto_compile_criteria", lambda *_: True)
    route.attach(llama, Recorder())
    for _ in range(3):
        llama.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, **options)
    assert len(made) == 1


def test_attach_keeps_the_identity_and_detach_leaves_no_trace(llama: PreTrainedModel) -> None:
    cls, attributes = type(llama), dict(llama.__dict__)
    route.attach(llama, Recorder())
    assert isinstance(llama, cls)
    assert (type(llama).__name__, type(llama).__module__) == (cls.__name__, cls.__module__)
    assert route.is_routed(llama)
    route.detach(llama)
    assert type(llama) is cls
    assert llama.__dict__ == attributes
    assert not route.is_routed(llama)


def test_attaching_twice_replaces_the_router(llama: PreTrainedModel) -> None:
    cls, first, second = type(llama), Recorder(), Recorder()
    route.attach(llama, first)
    route.attach(llama, second)
    llama(PROMPT)
    assert (first.seen, second.seen) == ([], ["forward"])
    route.detach(llama)
    assert type(llama) is cls


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("take", COPIES.values(), ids=COPIES.keys())
def test_copies_are_plain_models(llama: PreTrainedModel, take: Callable[[Any], Any]) -> None:
    expected, router = generate(llama), Recorder()
    route.attach(llama, router)
    twin = take(llama)
    assert not route.is_routed(twin)
    assert type(twin) is seam.bare_class(llama)
    assert route.is_routed(llama)
    assert_same(generate(twin), expected)
    assert router.seen == []
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


@pytest.mark.parametrize("protocol", [1, pickle.DEFAULT_PROTOCOL])
def test_a_pickle_can_be_loaded_without_this_package(llama: PreTrainedModel, protocol: int) -> None:
    route.attach(llama, Recorder())
    names = {value for _, value, _ in pickletools.genops(pickle.dumps(llama, protocol)) if isinstance(value, str)}
    assert not [name for name in names if "autotune" in name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_saves_the_original(llama: PreTrainedModel, variant: str, tmp_path: Any) -> None:
    routed = served(llama, variant)
    assert list(routed.state_dict()) == list(llama.state_dict())
    llama.save_pretrained(tmp_path / "plain")
    routed.save_pretrained(tmp_path / "routed")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert sorted(p.name for p in (tmp_path / "routed").iterdir()) == files
    for name in files:
        assert (tmp_path / "routed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = type(llama).from_pretrained(tmp_path / "routed")
    assert_same(generate(again), generate(llama))


def test_the_users_generation_config_stays_as_it_is(llama: PreTrainedModel) -> None:
    before = copy.deepcopy(llama.generation_config)
    generate(served(llama, "apart"), do_sample=True, top_k=7)
    assert llama.generation_config == before
