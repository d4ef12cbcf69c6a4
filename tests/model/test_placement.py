"""Models over several devices, offloaded or sharded: tuned where that is sound, declined with the reason elsewhere.

accelerate's hooks are real; the devices they move tensors between are the CPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model  # type: ignore[import-untyped]
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module  # type: ignore[import-untyped]
from torch import nn

import autotune
from autotune.errors import UnsupportedModelError
from autotune.model import linear_layers, placement
from autotune.model.twins import fork
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms import make
from autotune.transforms.cuda_graph import uncapturable
from tests import models
from tests.transforms.test_contract import COMPILER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def dispatched(tie: bool = False) -> PreTrainedModel:
    """A model with the hooks that accelerate gives to one over several devices."""
    model = models.tiny("llama", tie_word_embeddings=tie)
    return dispatch_model(model, dict.fromkeys(PARTS, "cpu"), force_hooks=True)


class Scaling(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return 2 * output


def hooked(hook: ModelHook) -> PreTrainedModel:
    model = models.tiny("llama")
    add_hook_to_module(model.lm_head, hook)
    return model


def mapped(**places: str) -> PreTrainedModel:
    model: Any = models.tiny("llama")
    model.hf_device_map = places
    return model


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One rank of its own."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.fault("C56")
@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: models.tiny("llama"), None),
        (lambda: mapped(**{"": "cuda:0"}), None),
        (lambda: mapped(embed="cuda:0", head="cuda:1"), None),
        (lambda: mapped(embed="cuda:0", head="cpu"), "offloads some of its modules to the CPU"),
        (lambda: mapped(embed="0", head="disk"), "to the disk"),
        (dispatched, None),
        (lambda: cpu_offload(models.tiny("llama")), "every token waits for their weights"),
        (lambda: hooked(AlignDevicesHook()), None),
        (lambda: hooked(SequentialHook(ModelHook(), AlignDevicesHook())), None),
        (lambda: hooked(SequentialHook(ModelHook(), Scaling())), "lm_head has a hook of accelerate's .*Scaling"),
        (lambda: models.tiny("llama").to("meta"), "on the meta device"),
    ],
)
def test_obstacles(build: Callable[[], PreTrainedModel], says: str | None) -> None:
    model = build()
    reason = placement.obstacle(model)
    assert linear_layers.obstacle(model) == reason
    if says is None:
        assert reason is None
        return
    with pytest.raises(UnsupportedModelError, match=says):
        autotune.wrap(model)


def test_a_model_on_the_disk_is_declined(tmp_path: Path) -> None:
    model = models.tiny("llama", tie_word_embeddings=False)
    disk_offload(model, str(tmp_path))
    assert "offloads" in (placement.obstacle(model) or "")


@pytest.mark.fault("C56")
def test_unknown_sharding_is_declined(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = models.tiny("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="sharded over ranks"):
        autotune.wrap(model)
    replica: Any = models.tiny("llama")
    replica._tp_size, replica._device_mesh = 2, mesh  # as by releases that shard with hooks
    assert "not by the tensor-parallel plan of transformers 5.18" in (placement.obstacle(replica) or "")


@pytest.mark.fault("C56")
def test_deepspeed_is_declined() -> None:
    model = models.tiny("llama")
    model.lm_head.weight.ds_id = 7
    assert "ZeRO-3" in (placement.obstacle(model) or "")


@pytest.mark.fault("C56")
@pytest.mark.parametrize(
    ("wrapper", "says"),
    [(nn.DataParallel, "pass the model inside, DataParallel's .module"), (torch.compile, "._orig_mod")],
)
def test_a_wrapper_names_what_is_inside(wrapper: Any, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        autotune.wrap(wrapper(models.tiny("llama")))


@pytest.mark.parametrize("tie", [False, True])
def test_twins_have_hooks_of_their_own(tie: bool) -> None:
    model = dispatched(tie)
    twin: Any = fork(model)
    for (name, module), copy in zip(model.named_modules(), twin.modules(), strict=True):
        assert type(getattr(module, "_hf_hook", None)) is type(getattr(copy, "_hf_hook", None)), name
        if hasattr(module, "_hf_hook"):
            assert copy.forward.args == (copy,), f"{name}'s forward is that of the original"
            assert copy._old_forward.__self__ is copy
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tie


@pytest.mark.parametrize(
    "transforms",
    [
        [("weight_only", {"bits": 8}, "decode")],
        [("linear_dtype", {}, "both")],
        [("torchao", {"compile": False}, "decode"), ("lean_loop", {}, "decode")],
        [("attention", {"implementation": "eager"}, "prefill"), ("lean_loop", {}, "decode")],
    ],
)
def test_layers_of_a_dispatched_model_are_exchanged_with_their_hooks(transforms: list[Any]) -> None:
    model, plain = dispatched(), models.tiny("llama", tie_word_embeddings=False)
    ids = torch.tensor(models.token_prompts(2))
    results = []
    for each in (model, plain):
        variant = Variant(each)
        for transform in (make(*t) for t in transforms):
            if (reason := transform.unavailable(variant, COMPILER)) is not None:
                pytest.skip(reason)
            variant = variant.with_transform(transform)
            assert transform.took_effect(variant) is None
        results.append(serving(variant).generate(ids, max_new_tokens=6, min_new_tokens=6))
        if each is model:
            decode = variant.modules["decode"]
            assert all(
                hasattr(decode.get_submodule(name), "_hf_hook")
                for name, module in model.named_modules()
                if hasattr(module, "_hf_hook")
            )
    assert torch.equal(*results)


def test_a_hook_of_a_replacement_is_called() -> None:
    model, seen = dispatched(), []

    class Watching(AlignDevicesHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return super().pre_forward(module, *args, **kwargs)

    model.lm_head._hf_hook.__class__ = Watching
    candidate = Variant(model).with_transform(make("linear_dtype", {}, "decode"))
    seen.clear()  # finding out what the model writes has run it
    candidate.modules["decode"](torch.tensor(models.token_prompts(1)))
    assert seen == ["CastLinear"]


@pytest.mark.fault("A28")
@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1.mlp.act_fn", "model.norm", "lm_head"])
def test_a_forward_that_somebody_put_on_a_part_is_not_recorded_into_a_phase(part: str) -> None:
    model = models.tiny("llama")
    assert placement.unrecordable(model) is None
    module = model.get_submodule(part)
    forward = module.forward
    module.forward = lambda *args: forward(*args)  # it may count, log, or look at what nobody sees here
    variant, expected = Variant(model), f"the forward of {part} was replaced on the object"
    for name, phase in (("step_program", "decode"), ("compile_step", "decode"), ("compile_prefill", "prefill")):
        assert expected in (make(name, {}, phase).unavailable(variant, COMPILER) or "")
    assert expected in (uncapturable(variant) or "")
    del module.forward
    assert placement.unrecordable(model) is None


def test_one_device() -> None:
    assert placement.one_device(models.tiny("llama")) is None
    assert "hooks run between the layers" in (placement.one_device(dispatched()) or "")
    several = models.tiny("llama")
    several.model.layers[1].to("meta")  # a second device without a GPU
    assert "is on cpu and meta; slots" in (placement.one_device(several) or "")
    assert placement.devices(several) == [torch.device("cpu"), torch.device("meta")]


def test_a_device_map_of_one_device_is_wrapped(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    models.tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate needs none for one device
    ids = torch.tensor(models.token_prompts(1))
    expected = model.generate(ids, max_new_tokens=4)
    wrapped = autotune.wrap(model, when="manual")
    assert torch.equal(wrapped.generate(ids, max_new_tokens=4), expected)
    wrapped.autotune.unwrap()
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_dispatched_model_is_wrapped_and_unwrapped() -> None:
    model: Any = dispatched()
    ids = torch.tensor(models.token_prompts(1))
    expected = model.generate(ids, max_new_tokens=4)
    wrapped = autotune.wrap(model, when="manual")
    assert torch.equal(wrapped.generate(ids, max_new_tokens=4), expected)
    assert wrapped(ids).logits.shape == (1, 12, models.VOCABULARY)
    wrapped.autotune.unwrap()
    assert model.forward.args == (model,)


@pytest.mark.gpu
def test_two_gpus() -> None:
    """Layers on two devices keep their hooks; the token goes back to the first, and slots are refused."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    places = dict(zip(PARTS, (0, 0, 1, 1, 0, 1), strict=True))
    plain = models.tiny("llama", tie_word_embeddings=False).bfloat16()
    ids = torch.tensor(models.token_prompts(2), device="cuda:0")
    model = dispatch_model(models.tiny("llama", tie_word_embeddings=False).bfloat16(), places)
    assert placement.obstacle(model) is None
    assert "is on cuda:0 and cuda:1" in (placement.one_device(model) or "")
    results = []
    for each in (model, plain.to("cuda:0")):
        variant = Variant(each)
        for name, params in (("bitsandbytes", {"scheme": "int8_vectorwise"}), ("lean_loop", {})):
            variant = variant.with_transform(make(name, params, "decode"))
        results.append(serving(variant).generate(ids, max_new_tokens=8, min_new_tokens=8))
    assert torch.equal(*results)
