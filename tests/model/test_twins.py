"""Twins: modules of their own, everything else shared, whatever a model holds."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from autotune.model import route
from autotune.model.twins import fork
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from tests.models import ARCHITECTURES, tiny, token_prompts

IDS = torch.tensor(token_prompts(1))


class Counter:
    """A user's object whose method is a hook."""

    def __init__(self) -> None:
        self.calls = 0
        self.lock = threading.Lock()

    def hook(self, module: Any, args: Any, output: Any) -> None:
        with self.lock:
            self.calls += 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_twin_computes_the_same_from_the_same_tensors(name: str) -> None:
    model = tiny(name)
    twin = fork(model)
    assert type(twin) is type(model)
    own, theirs = dict(model.named_modules()), dict(twin.named_modules())
    assert own.keys() == theirs.keys()
    assert not {id(module) for module in own.values()} & {id(module) for module in theirs.values()}
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert twin.config is not model.config
    assert twin.generation_config is not model.generation_config
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_what_is_one_module_in_the_model_is_one_in_the_twin(llama: Any) -> None:
    llama.again = llama.model.layers[0]
    llama.pairs = [(llama.model.norm, {"norm": llama.model.norm})]
    twin: Any = fork(llama)
    assert twin.again is twin.model.layers[0]
    assert twin.pairs == [(twin.model.norm, {"norm": twin.model.norm})]
    assert twin.get_output_embeddings().weight is llama.get_input_embeddings().weight


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_leads_back_to_itself(llama: Any, wrapped: bool) -> None:
    import autotune

    llama.callback = llama.generate
    llama.owner = {"model": llama}
    llama.late = functools.partial(llama.forward, use_cache=False)
    if wrapped:
        autotune.wrap(llama, when="manual")
    copies = [copy.deepcopy(llama), pickle.loads(pickle.dumps(llama)), fork(route.bare(llama))]
    for each in copies:
        assert each.callback.__self__ is each
        assert each.owner == {"model": each}
        assert each.late.func.__self__ is each
        assert not route.is_routed(each)
    twin = copies[-1]
    twin.lm_head = nn.Linear(64, 256)
    with torch.no_grad():
        assert torch.equal(twin.late(IDS).logits, twin(IDS).logits)  # not through the head of the model


def test_what_cannot_be_copied_is_shared(llama: Any) -> None:
    llama.lock = threading.Lock()
    llama.stream = io.StringIO()
    llama.model.layers[0].events = iter([])
    counter = Counter()
    llama.model.norm.register_forward_hook(counter.hook)
    twin: Any = fork(llama)
    assert twin.lock is llama.lock
    assert twin.stream is llama.stream
    assert twin.model.layers[0].events is llama.model.layers[0].events
    with torch.no_grad():
        twin(IDS)
    assert counter.calls == 1


def test_editing_a_twins_containers_leaves_the_model_alone(llama: Any) -> None:
    llama.names = ["a"]
    llama.scales = {"a": [1.0]}
    llama.kinds = {1}
    twin: Any = fork(llama)
    twin.names.append("b")
    twin.scales["a"].append(2.0)
    twin.kinds.add(2)
    twin.config.rope_parameters["rope_theta"] = 1.0
    assert (llama.names, llama.scales, llama.kinds) == (["a"], {"a": [1.0]}, {1})
    assert llama.config.rope_parameters["rope_theta"] != 1.0


def test_a_model_with_accelerates_hooks_is_served_by_a_twin() -> None:
    from accelerate import dispatch_model  # type: ignore[import-untyped]

    from autotune import transforms

    expected = tiny("llama").generate(IDS, max_new_tokens=5)
    model = dispatch_model(tiny("llama"), device_map={"": "cpu"}, force_hooks=True)
    for name, phase in (("lean_loop", "both"), ("dynamic_int8", "prefill")):
        variant = Variant(model).with_transform(transforms.make(name, {}, phase))
        assert serving(variant).generate(IDS, max_new_tokens=5).shape == expected.shape
    exact = Variant(model).with_transform(transforms.make("lean_loop", {}, "both"))
    exact.edit("both")
    assert torch.equal(serving(exact).generate(IDS, max_new_tokens=5), expected)
    assert torch.equal(exact.front.generate(IDS, max_new_tokens=5), expected)
