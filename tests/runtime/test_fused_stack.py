"""All layers of a prompt in one operator: the numbers of the layers one by one, and every way back to these."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

from autotune.errors import VariantError
from autotune.model import seam
from autotune.runtime import fused_decoder, fused_stack, kernels
from autotune.runtime.dispatch import serving
from autotune.runtime.fused_decoder import around
from autotune.runtime.kernels.bf16 import FEW
from autotune.runtime.variant import Variant
from autotune.transforms import make
from tests import models
from tests.runtime.test_fused_decoder import (
    BATCHES,
    FORMS,
    FUSE,
    INT8,
    LAYERS,
    PACKED,
    WEIGHTS,
    drawn,
    operators,
    prefill,
    require_same,
    run,
)

OPERATORS = kernels.available()
pytestmark = pytest.mark.skipif(OPERATORS is not None, reason=str(OPERATORS))

PROMPT = BATCHES["a prompt"]


def one_by_one(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of a call whose layers compute themselves."""
    with monkeypatch.context() as patch:
        patch.setattr(fused_stack, "MOST_TOKENS", 0)
        return call()


def whole(call: Callable[[], Any]) -> int:
    """How often a call computed all layers at once."""
    return sum(count for name, count in operators(call).items() if name.startswith("layers"))


def require_same_as_single(module: Any, given: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    got, expected = run(module, given), one_by_one(lambda: run(module, given), monkeypatch)
    assert len(got) == len(expected) == 1 + 2 * LAYERS
    require_same(got, expected)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_numbers_are_those_of_single_layers(weights: str, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = prefill(models.tiny(), weights), BATCHES[batch]
    require_same_as_single(module, given, monkeypatch)
    few = weights.startswith("BF16") and weights != "BF16" and given["input_ids"].numel() < FEW
    assert whole(lambda: run(module, given)) == int(batch != "one token" and not few)


@pytest.mark.parametrize(("architecture", "changes"), FORMS)
@pytest.mark.parametrize("weights", ["INT8", "BF16", "FP16", "INT4, some INT8"])
def test_architectures(
    architecture: str, changes: dict[str, Any], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = prefill(drawn(architecture, changes), weights)
    given = models.left_padded((50, 37))
    assert whole(lambda: run(module, given)) == 1
    require_same_as_single(module, given, monkeypatch)


def test_answers_and_what_follows_the_prompt() -> None:
    """A cache that was filled by one operator is read by later parts and by decode."""
    model = models.tiny()
    variant = Variant(model).with_transforms([INT8, PACKED, make("prefill_attention", {}, "prefill"), FUSE])
    ids = torch.tensor(models.token_prompts(1, length=70))
    answer = lambda: serving(variant).generate(ids, max_new_tokens=8, do_sample=False)  # noqa: E731
    assert whole(answer) == 1
    module = variant.modules["prefill"]
    parts, at_once = seam.growing_cache(), seam.growing_cache()
    with torch.no_grad():
        for part in ids.split(32, 1):
            got = module(input_ids=part, **seam.over(module, parts)).logits[:, -1]
        expected = module(input_ids=ids, **seam.over(module, at_once)).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def hooked(module: Any) -> None:
    module.model.layers[1].register_forward_hook(lambda *_: None)


def hooked_inside(module: Any) -> None:
    module.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)


def replaced(module: Any) -> None:
    layer = module.model.layers[1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)


def of_another_size(module: Any) -> None:
    module.model.layers[1].mlp.activation += 1


def with_another_attention(module: Any) -> None:
    module.config._attn_implementation_internal = "sdpa"


def with_a_narrow_norm(module: Any) -> None:
    norm = module.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data.half()


@pytest.mark.parametrize("change", [hooked, hooked_inside, replaced, with_another_attention])
def test_layers_that_changed_compute_themselves(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    module = prefill(models.tiny())
    assert whole(lambda: run(module, PROMPT)) == 1
    change(module)
    assert whole(lambda: run(module, PROMPT)) == 0
    require_same_as_single(module, PROMPT, monkeypatch)


@pytest.mark.parametrize("change", [of_another_size, with_a_narrow_norm])
def test_layers_that_one_operator_cannot_compute_are_left(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = prefill(models.tiny())
    change(module)
    assert whole(lambda: run(module, PROMPT)) == 0
    require_same_as_single(module, PROMPT, monkeypatch)


def test_tensors_that_moved_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are looked up once, and again when a tensor lies elsewhere."""
    module, looked_up = prefill(models.tiny(), "INT8"), list[int]()
    own = fused_stack._held

    def noted(*given: Any) -> Any:
        looked_up.append(len(given[0]))
        return own(*given)

    monkeypatch.setattr(fused_stack, "_held", noted)
    before = run(module, PROMPT)
    require_same(run(module, PROMPT), before)
    assert len(looked_up) == 1
    scales = module.model.layers[1].self_attn.o_proj.packed["scales"]
    scales.data = scales.data * 2
    require_same_as_single(module, PROMPT, monkeypatch)
    assert len(looked_up) == 2
    assert not torch.equal(run(module, PROMPT)[0], before[0])


def test_few_and_many_tokens_take_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers for BF16 products over packed weights leave few tokens to integers."""
    module = prefill(models.tiny(), "BF16")
    for length in (70, 20, 70, 20):
        given = {"input_ids": PROMPT["input_ids"][:, :length]}
        require_same_as_single(module, given, monkeypatch)


def test_a_hook_on_all_modules_sees_every_layer() -> None:
    module, seen = prefill(models.tiny()), list[str]()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        assert whole(lambda: run(module, PROMPT)) == 0
    finally:
        handle.remove()
    assert seen.count("LlamaDecoderLayer") >= LAYERS


def test_a_mask_with_gaps_and_a_long_prompt_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    module = prefill(models.tiny())
    gaps = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    gaps[..., 5] = False
    gaps[..., 5, 5] = True
    assert whole(lambda: run(module, {"input_ids": PROMPT["input_ids"], "attention_mask": gaps})) == 0
    monkeypatch.setattr(fused_stack, "MOST_TOKENS", 69)
    assert whole(lambda: run(module, PROMPT)) == 0


def test_what_single_layers_give_is_given() -> None:
    module = prefill(models.tiny())
    with torch.no_grad():
        got = module(**PROMPT, output_hidden_states=True)
    assert len(got.hidden_states) == LAYERS + 1
    assert not torch.equal(got.hidden_states[1], got.hidden_states[2])


def test_caches_that_ask_for_more_get_it() -> None:
    model = models.tiny()
    module = prefill(model)

    def answer() -> None:
        with torch.no_grad():
            module(**PROMPT, **seam.over(module, transformers.StaticCache(config=model.config, max_cache_len=96)))

    assert whole(answer) == 0


def test_a_model_whose_layers_see_different_masks_is_left() -> None:
    """Gemma's layers have windows in turn, and angles of their own."""
    model = models.tiny(
        "qwen3", sliding_window=8, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]
    )
    module = prefill(model)
    assert "forward" not in vars(module.model)
    assert whole(lambda: run(module, PROMPT)) == 0


class Scaled(transformers.LlamaModel):
    """Changes the numbers between its layers."""

    def forward(self, inputs_embeds: torch.Tensor | None = None, **given: Any) -> Any:
        x = inputs_embeds
        angles = self.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in self.layers:
            x = layer(x * 2, attention_mask=None, position_embeddings=angles)
        return x


def test_a_model_that_does_something_between_its_layers_is_left() -> None:
    module = prefill(models.tiny())
    owner = module.model
    del owner.__dict__["forward"]
    assert fused_stack.stacked_forward(owner) is not None
    owner.__class__ = Scaled
    assert fused_stack.stacked_forward(owner) is None


def test_layers_that_are_called_otherwise_are_an_error() -> None:
    """The original answers then: what the first layer computed for all is not what they are asked for."""
    module = prefill(models.tiny())
    layers = list(module.model.layers)
    x, angles = torch.randn(1, 8, 64), module.model.rotary_emb(torch.ones(1), torch.arange(8)[None])
    stack = fused_stack.Stack(layers, {"scaling": 0.25, "dropout": 0.0})
    token = around.set(stack)
    try:
        with torch.no_grad():
            y = layers[0](x, attention_mask=None, position_embeddings=angles)
            assert layers[1](y, attention_mask=None, position_embeddings=angles) is y
            stack._called = 1
            for other in ((y.clone(), angles), (y, (angles[0].clone(), angles[1]))):
                with pytest.raises(VariantError, match="otherwise than it did"):
                    layers[1](other[0], attention_mask=None, position_embeddings=other[1])
            with pytest.raises(VariantError, match="otherwise than it did"):
                layers[0](y, attention_mask=None, position_embeddings=angles)  # out of turn
    finally:
        around.reset(token)


def test_fewer_layers_than_were_computed_are_an_error() -> None:
    module = prefill(models.tiny())
    module.config.num_hidden_layers = LAYERS - 1
    with pytest.raises(VariantError, match=f"called {LAYERS - 1} of its {LAYERS} decoder layers"):
        run(module, PROMPT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held, form: (held[:-1], form), "fewer tensors"),
        (lambda held, form: ([*held, held[0]], form), "more tensors"),
        (lambda held, form: (held, form[:, :-1]), "form must be"),
        (lambda held, form: (held, form.int()), "form must be"),
    ],
    ids=["too few", "too many", "too narrow", "wrong dtype"],
)
def test_the_operator_refuses(change: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = prefill(models.tiny(), "INT8")
    own = fused_stack._held

    def damaged(*given: Any) -> Any:
        held, form, eps = own(*given)
        return *change(held, form), eps

    monkeypatch.setattr(fused_stack, "_held", damaged)
    with pytest.raises(RuntimeError, match=message):
        run(module, PROMPT)


@pytest.mark.parametrize("weights", ["INT8", "BF16", "FP16"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_do_not_change_numbers(weights: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = prefill(models.tiny(), weights)
    expected, before = run(module, PROMPT), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            require_same(run(module, PROMPT), expected)
    finally:
        torch.set_num_threads(before)


def test_callers_side_by_side_get_the_same_numbers() -> None:
    """Each has threads of its own, more than there are cores: a late one's shares are taken by the one that waits."""
    module = prefill(models.tiny(), "INT8")
    expected = run(module, PROMPT)

    def ask() -> list[torch.Tensor]:
        torch.set_num_threads(3)
        found = [run(module, PROMPT) for _ in range(15)]
        for each in found:
            require_same(each, expected)
        return found[-1]

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(ask) for _ in range(8)]
            for call in calls:
                require_same(call.result(120), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_within_ends_the_call_alone(threads: int) -> None:
    """The operator for products in integers refuses weights of another kind once its threads are together."""
    module = prefill(models.tiny(), "FP16")
    expected = run(module, PROMPT)
    table = next(iter(fused_stack._prepared[module.model].values())).table
    angles = module.model.rotary_emb(torch.ones(1), torch.arange(8)[None])
    given = torch.randn(1, 8, 64), table, LAYERS, 32, *angles, None, 0.25, 0, 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="products in integers are for INT8"):
                torch.ops.autotune.layers_rounded(*given, 2)
            require_same(run(module, PROMPT), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:-1], "that `layer_table` made"),
        (lambda table: table[: 5 * 8], "that `layer_table` made"),
        (lambda table: table.short(), "that `layer_table` made"),
        (
            lambda table: torch.cat([torch.tensor([9, *[0] * 7], dtype=torch.uint8), table[8:]]),
            "that `layer_table` made",
        ),
    ],
    ids=["too short", "no layers", "wrong dtype", "wrong count"],
)
def test_a_damaged_table_is_refused(change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    module = prefill(models.tiny(), "INT8")
    run(module, PROMPT)
    table = next(iter(fused_stack._prepared[module.model].values())).table
    angles = module.model.rotary_emb(torch.ones(1), torch.arange(8)[None])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.autotune.layers_rounded(
            torch.randn(1, 8, 64), change(table), LAYERS, 32, *angles, None, 0.25, 0, 0, 2
        )


def test_its_shapes_are_known_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = prefill(models.tiny(), "INT8"), list[tuple[Any, ...]]()
    *others, own = fused_decoder._operators("_rounded")

    def noted(*given: Any) -> Any:
        calls.append(given)
        return own(*given)

    monkeypatch.setattr(fused_decoder, "_operators", lambda family: (*others, noted))
    run(module, PROMPT)
    torch.library.opcheck(own, calls[0], test_utils=("test_schema", "test_faketensor"))
