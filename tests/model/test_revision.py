"""Whatever changes what a model computes is seen before the next call, and a change that is undone is none."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from torch import nn
from torch.nn.modules import module as registry
from transformers import PreTrainedModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import autotune
from autotune import transforms
from autotune.model.revision import UNCOUNTED, Revision, hooked
from autotune.runtime.steps.compiled import layers_as_regions
from autotune.runtime.variant import Transform
from tests.live.test_wrap import scripted, wrapped  # noqa: F401 - a fixture
from tests.models import tiny, token_prompts

IDS = torch.tensor(token_prompts(2))
Change = Callable[[Any], Any]


def layer(model: Any) -> Any:
    return model.model.layers[0]


class Doubled(nn.SiLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def assign(where: Callable[[Any], Any], name: str, value: Any) -> Change:
    return lambda model: setattr(where(model), name, value)


def swap_class(model: Any) -> None:
    layer(model).mlp.act_fn.__class__ = Doubled


def patch_class(model: Any) -> None:
    model.model.norm.__class__ = type("Norm", (type(model.model.norm),), {})


def write(kind: str) -> Change:
    def change(model: Any) -> None:
        weight = layer(model).mlp.up_proj.weight
        with torch.no_grad():
            if kind == "in place":
                weight.mul_(2)
            elif kind == "through data":
                weight.data.mul_(2)
            elif kind == "other data":
                weight.data = weight.data * 2
            else:
                weight.requires_grad_(True).grad = torch.ones_like(weight)
                torch.optim.AdamW([weight], lr=0.1, fused=True).step()
                weight.requires_grad_(False).grad = None

    return change


CHANGES: dict[str, tuple[Change, str]] = {
    "a module": (
        lambda m: m.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(64, 96, False)),
        "module up_proj of",
    ),
    "no module": (assign(lambda m: layer(m).mlp, "act_fn", None), "module act_fn of"),
    "one module more": (lambda m: layer(m).add_module("other", nn.Identity()), "module other of"),
    "a parameter": (
        assign(lambda m: m.model.norm, "weight", nn.Parameter(torch.ones(64))),
        "tensor weight of model.norm",
    ),
    "a bias": (
        assign(lambda m: m.lm_head, "bias", nn.Parameter(torch.ones(256))),
        "tensor bias of lm_head",
    ),
    "a buffer": (lambda m: layer(m).mlp.register_buffer("offset", torch.ones(96)), "tensor offset of"),
    "a forward": (assign(lambda m: layer(m).mlp, "forward", lambda x: x), "attribute forward of model.layers.0.mlp"),
    "a neighbour's forward": (
        lambda m: setattr(layer(m).mlp, "forward", m.model.layers[1].mlp.forward),
        "attribute forward of model.layers.0.mlp",
    ),
    "a number": (assign(lambda m: layer(m).self_attn, "scaling", 0.5), "attribute scaling of model.layers.0.self_attn"),
    "eps": (assign(lambda m: m.model.norm, "variance_epsilon", 0.1), "attribute variance_epsilon of model.norm"),
    "a class": (swap_class, "a class or its forward was replaced"),
    "a norm's class": (patch_class, "a class or its forward was replaced"),
    "the configuration": (assign(lambda m: m.config, "rms_norm_eps", 0.1), "attribute rms_norm_eps of"),
    "within the configuration": (lambda m: m.config.rope_parameters.update(rope_theta=1.0), "attribute rope_theta of"),
    "attention": (lambda m: m.set_attn_implementation("eager"), "attribute _attn_implementation"),
    "training": (lambda m: m.train(), "training mode"),
    "training of a part": (lambda m: layer(m).train(), "attribute training of model.layers.0"),
    "double": (lambda m: m.double(), "tensor inv_freq of model.rotary_emb was replaced"),
    "written in place": (write("in place"), "tensor model.layers.0.mlp.up_proj.weight was written"),
    "written through data": (write("through data"), UNCOUNTED),
    "other data": (write("other data"), "tensor model.layers.0.mlp.up_proj.weight was written"),
    "a fused optimizer": (write("fused"), UNCOUNTED),
}


@pytest.mark.fault("D63")
@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Change, said: str) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    revision = Revision(model)
    assert revision.changed() is None
    change(model)
    assert said in str(revision.changed())
    assert Revision(model).changed() is None


HOOKS: dict[str, Callable[[Any], Any]] = {
    "the model": lambda m: m.register_forward_hook(lambda *_: None),
    "model.layers.0": lambda m: layer(m).register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "lm_head": lambda m: m.lm_head.register_forward_hook(lambda *_: None, always_call=True),
    "every module": lambda _: registry.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize(("where", "add"), HOOKS.items())
def test_a_hook_is_seen_while_it_is_there(where: str, add: Callable[[Any], Any]) -> None:
    model = tiny("llama")
    revision = Revision(model)
    handle = add(model)
    try:
        assert revision.changed() == Revision(model).changed() == f"there is a forward hook on {where}"
        assert revision.differs() is None
        assert hooked(model) == where
    finally:
        handle.remove()
    assert revision.changed() is None
    assert hooked(model) is None


def saved(model: Any) -> None:
    """`save_pretrained` writes the dtype and the class's name into the configuration."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.generate(IDS, max_new_tokens=3),
        lambda m: m.generate(IDS, max_new_tokens=3, num_beams=2),
        lambda m: m.generate(IDS, max_new_tokens=3, cache_implementation="static"),
        lambda m: m(IDS, labels=IDS, output_hidden_states=True),
        lambda m: setattr(m.generation_config, "temperature", 0.5),
        lambda m: m.to("cpu").float().eval().requires_grad_(False),
        lambda m: (m.train(), m.eval()),
        lambda m: setattr(layer(m).self_attn, "scaling", float(str(layer(m).self_attn.scaling))),
        lambda m: m.set_attn_implementation(m.config._attn_implementation),
        lambda m: saved(m),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "mixtral", "gemma3", "phi3"])
def test_use_is_no_change(name: str, use: Change) -> None:
    model = tiny(name)
    if name != "llama" and "self_attn" in use.__code__.co_names:
        pytest.skip("a Llama's attribute")
    revision = Revision(model)
    with torch.no_grad():
        use(model)
    assert revision.look_closer() is None


@pytest.mark.skipif(not hasattr(PreTrainedModel, "get_experts_implementation"), reason="experts in one form alone")
def test_experts_that_generate_exchanges_while_it_decodes_are_no_change() -> None:
    model = tiny("mixtral")
    revision, before = Revision(model), model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    assert revision.changed() is None
    assert Revision(model).changed() is None
    model.set_experts_implementation(before)
    assert revision.look_closer() is None


def test_another_models_compilation_is_no_change() -> None:
    """It puts another forward into the class of the layers for a while."""
    one, other = tiny("llama"), tiny("llama")
    before = Revision(one)
    with layers_as_regions(other, True):
        assert before.changed() is None
        during = Revision(one)
    assert before.changed() is None
    assert during.changed() is None


def test_what_generate_writes_into_a_model_of_text_and_images_is_no_change() -> None:
    text = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    model: Any = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    revision = Revision(model)
    for rows in (1, 2):
        model.generate(IDS[:rows], max_new_tokens=2, do_sample=False)
        assert revision.changed() is None


def test_a_forward_that_was_exchanged_and_put_back_is_no_change() -> None:
    """As transformers 4.57 does where hidden states are asked for: what is put back is the bound method."""
    model = tiny("llama")
    revision, part = Revision(model), layer(model).mlp
    forward = part.forward
    part.forward = lambda x: forward(x)
    assert "attribute forward of model.layers.0.mlp" in str(revision.changed())
    part.forward = forward
    assert revision.look_closer() is None
    assert Revision(model).changed() is None
    del part.forward
    assert revision.changed() is None


def test_a_closer_look_sees_more(llama: Any) -> None:
    revision = Revision(llama)
    weight = layer(llama).mlp.up_proj.weight
    row = weight.abs().amax(1).argmin()  # not the row with the largest number
    weight.data[row] += 1e-3
    assert revision.look_closer() == UNCOUNTED
    weight.data[row] -= 1e-3
    assert revision.changed() == UNCOUNTED  # what was found stays found


def test_numbers_that_are_not_numbers_are_no_change(llama: Any) -> None:
    llama.register_buffer("odd", torch.full((100,), torch.nan))
    llama.register_buffer("infinite", torch.full((100,), -torch.inf))
    assert Revision(llama).look_closer() is None


# What a wrapped model does about it

SCALE = 64.0


def adapted(seed: int = 0) -> Any:
    model = tiny("llama")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=SCALE)
    for name in ("a", "b"):
        peft.inject_adapter_in_model(config, model, name)
    switch(model, "a")
    return model.eval().requires_grad_(False)


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def switch(model: Any, *names: str) -> None:
    for each in layers(model):
        each.set_adapter(list(names))
    model.requires_grad_(False)


def enable(model: Any, enabled: bool) -> None:
    for each in layers(model):
        each.enable_adapters(enabled)
    model.requires_grad_(False)


def add(model: Any) -> None:
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=SCALE)
    peft.inject_adapter_in_model(config, model, "c")
    switch(model, "c")


ADAPTERS: dict[str, Change] = {
    "another": lambda m: switch(m, "b"),
    "both": lambda m: switch(m, "a", "b"),
    "off": lambda m: enable(m, False),
    "scaled": lambda m: [each.set_scale("a", 5.0) for each in layers(m)],
    "merged": lambda m: [each.merge() for each in layers(m)],
    "written": lambda m: [each.lora_A["a"].weight.mul_(3) for each in layers(m)],
    "written through data": lambda m: [each.lora_B["a"].weight.data.mul_(3) for each in layers(m)],
    "one more": add,
    "one less": lambda m: [each.delete_adapter("a") for each in layers(m)],
}
UNDONE: dict[str, Change] = {
    "another": lambda m: switch(m, "a"),
    "both": lambda m: switch(m, "a"),
    "off": lambda m: enable(m, True),
    "scaled": lambda m: [each.set_scale("a", 1.0) for each in layers(m)],
}
PLANS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "lean": [("lean_loop", {}, "both")],
    "slots": [("static_cache", {}, "decode")],
    "int8": [("dynamic_int8", {}, "prefill")],
}


def tokens(model: Any, **options: Any) -> list[list[int]]:
    with torch.no_grad():
        found: list[list[int]] = model.generate(IDS, max_new_tokens=8, do_sample=False, **options).tolist()
    return found


@pytest.mark.filterwarnings("ignore:autotune:RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("change", ADAPTERS)
@pytest.mark.parametrize("plan", ["lean", "slots"])
def test_adapters_count(scripted: list[Transform], plan: str, change: str) -> None:  # noqa: F811
    scripted[:] = [transforms.make(*each) for each in PLANS[plan]]
    plain, model = adapted(), wrapped(adapted())
    before = tokens(plain)
    assert tokens(model) == before
    with torch.no_grad():
        for each in (plain, model):
            ADAPTERS[change](each)
    assert tokens(model) == tokens(plain)
    assert model.autotune.status.state == "stale"
    if (undo := UNDONE.get(change)) is None:
        return
    undo(model)
    assert tokens(model) == before
    assert model.autotune.status.state == "tuned"
    assert model.autotune.status.served == 2
    assert model.autotune.status.transforms


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_act_once_a_call_and_the_plan_waits(scripted: list[Transform], when: str) -> None:  # noqa: F811
    calls: dict[int, int] = {}

    def add(model: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            calls[id(model)] = calls.get(id(model), 0) + 1
            output.logits = output.logits * -1
            return output

        return model.register_forward_hook(hook)

    plain, model = tiny("llama"), tiny("llama")
    handles = [add(plain)] + ([add(model)] if when == "before" else [])
    wrapped(model)
    if when == "after":
        handles.append(add(model))
    calls.clear()
    with pytest.warns(RuntimeWarning, match=r"there is a forward hook on the model\); the original serves"):
        assert tokens(model) == tokens(plain)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert calls[id(model)] == calls[id(plain)] == 9
    assert model.autotune.status.served == 0
    for handle in handles:
        handle.remove()
    assert tokens(model) == tokens(plain)
    assert model.autotune.status.served == 1


def hook(model: Any) -> None:
    layer(model).register_forward_hook(lambda *_: None)


def patch(model: Any) -> None:
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


class Noting(ModelHook):
    pass


def dispatch(model: Any) -> None:
    add_hook_to_module(layer(model).mlp.up_proj, Noting())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dispatch, "that may change its result (Noting)"),
        (hook, "there is a forward hook on model.layers.0, which no plan would call"),
        (patch, "the model's forward was replaced on the object"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_is_tried_that_no_plan_would_call(change: Change, why: str, when: str) -> None:
    from dataclasses import replace

    from autotune.tune import policy

    model = tiny("llama")
    short = replace(policy.load("balanced"), budget_s=3.0)
    if when == "before" and change is dispatch:
        pytest.skip("such a model is not wrapped at all")
    if when == "before":
        change(model)
    autotune.wrap(model, policy=short, when="manual", cache=False)
    if when == "after":
        change(model)
    model.autotune.tune(token_prompts(8))
    assert "could not be tried" in model.autotune.status.detail
    assert why in model.autotune.report().to_markdown()


def test_methods_are_no_attributes_of_a_module(llama: Any) -> None:
    """A method bound to the model, kept by itself, does not lead around in a circle."""
    llama.own = types.MethodType(lambda self: self, llama)
    llama.list = [llama, {"model": llama}]
    assert Revision(llama).changed() is None
