"""Variants: whatever is done to one, the original keeps every bit, and nothing global stays changed."""

from __future__ import annotations

import gc
import hashlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import nn

from autotune.errors import TransformError, VariantError
from autotune.model.twins import fork
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.workload import PHASES
from tests.models import ARCHITECTURES, left_padded, tiny, token_prompts
from tests.surroundings import surroundings

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

PROMPT = torch.tensor(token_prompts(1))  # [1, 12]


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Everything a transform must leave alone: tensors by identity, place and content, configuration, logits."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    hashed = {
        name: (id(t), t.data_ptr(), hashlib.sha256(t.detach().cpu().numpy().tobytes()).hexdigest())
        for name, t in tensors.items()
    }
    with torch.no_grad():
        logits = model(PROMPT).logits.numpy().tobytes()
    return {
        "tensors": hashed,
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "attributes": sorted(model.__dict__),
        "config": model.config.to_dict() | {"attention": model.config._attn_implementation},
        "generation": model.generation_config.to_dict(),
        "logits": hashlib.sha256(logits).hexdigest(),
    }


@dataclass(frozen=True)
class Edit(Transform):
    """Does `what` to the twins, and nothing else."""

    what: str = "nothing"

    name: ClassVar[str] = "edit"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "an edit"

    def apply(self, variant: Variant) -> None:
        for twin in variant.edit(self.phase):
            EDITS[self.what](twin)


@dataclass(frozen=True)
class LaterEdit(Edit):
    name: ClassVar[str] = "later-edit"
    stage: ClassVar[Stage] = Stage.CACHE


@dataclass(frozen=True)
class SetThreads(Transform):
    count: int = 1

    name: ClassVar[str] = "set-threads"
    stage: ClassVar[Stage] = Stage.THREADS
    summary: ClassVar[str] = "threads"

    def apply(self, variant: Variant) -> None:
        for phase in self.phases:
            variant.threads[phase] = self.count


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]


def replace_weights(model: nn.Module, limit: int | None = None) -> None:
    for parent, name, old in linears(model)[:limit]:
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None).requires_grad_(False)
        new.weight = nn.Parameter(old.weight.half().float() * 1.5, requires_grad=False)
        setattr(parent, name, new)


def replace_half_and_raise(model: nn.Module) -> None:
    replace_weights(model, limit=len(linears(model)) // 2)
    raise TransformError("half-way")


def crash(model: nn.Module) -> None:
    replace_weights(model, limit=1)
    raise ZeroDivisionError("half-way")


def change_configuration(model: Any) -> None:
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    model.generation_config.max_new_tokens = 3


def forget_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def wrong_output(model: Any) -> None:
    model.lm_head.forward = lambda hidden: torch.zeros(*hidden.shape[:-1], 256)


EDITS: dict[str, Callable[[Any], None]] = {
    "nothing": lambda model: None,
    "weights": replace_weights,
    "refusal half-way": replace_half_and_raise,
    "crash half-way": crash,
    "configuration": change_configuration,
    "modules": forget_layers,
    "forward": wrong_output,
    "compiled": lambda model: setattr(model, "_compiled_call", object()),
    "training": lambda model: model.train(),
}
RAISES = {"refusal half-way": TransformError, "crash half-way": ZeroDivisionError}


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
@pytest.mark.parametrize("what", EDITS)
def test_the_original_keeps_every_bit(llama: PreTrainedModel, what: str, phase: Any) -> None:
    before, around = fingerprint(llama), surroundings()
    variant = Variant(llama).with_transforms((Edit(phase),))
    if what in RAISES:
        with pytest.raises(RAISES[what]):
            variant.with_transform(LaterEdit(phase, what))
    else:
        variant.with_transform(LaterEdit(phase, what))
    assert fingerprint(llama) == before
    assert surroundings() == around
    generated = serving(variant).generate(PROMPT, max_new_tokens=8)  # the variant before is untouched, too
    assert torch.equal(generated, llama.generate(PROMPT, max_new_tokens=8))
    assert fingerprint(llama) == before


@pytest.mark.parametrize("what", ["weights", "modules", "forward"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_edit_shows_in_its_own_phase_alone(llama: PreTrainedModel, what: str, phase: Any) -> None:
    model = serving(Variant(llama).with_transforms((Edit(phase, what),)))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    expected = llama.generate(PROMPT, **options).logits
    got = model.generate(PROMPT, **options).logits
    assert torch.equal(got[0], expected[0]) == (phase == "decode")
    assert not torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fork_shares_every_tensor_and_computes_the_same(name: str) -> None:
    model = tiny(name)
    before, twin = fingerprint(model), fork(model)
    shared = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    copied = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers())
    assert shared.keys() == copied.keys()
    assert all(copied[key] is tensor for key, tensor in shared.items())
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    assert twin.config is not model.config
    for inputs in ({"input_ids": PROMPT}, left_padded()):
        expected = model.generate(**inputs, max_new_tokens=8)
        assert torch.equal(twin.generate(**inputs, max_new_tokens=8), expected)
    assert fingerprint(model) == before


def test_ties_stay_ties(llama: PreTrainedModel) -> None:
    (twin,) = Variant(llama).with_transforms(()).edit("both")
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_fork_leaves_a_compiled_call_behind(llama: PreTrainedModel) -> None:
    llama._compiled_call = lambda *_: None
    assert "_compiled_call" not in fork(llama).__dict__


BOTH, PREFILL, DECODE = "both", "prefill", "decode"
# edits in order -> whether (prefill is the original's, decode is the original's, both are one module)
FORKS: list[tuple[tuple[Any, ...], tuple[bool, bool, bool]]] = [
    ((), (True, True, True)),
    ((BOTH,), (False, False, True)),
    ((BOTH, BOTH), (False, False, True)),
    ((DECODE,), (True, False, False)),
    ((PREFILL,), (False, True, False)),
    ((PREFILL, DECODE), (False, False, False)),
    ((DECODE, BOTH), (False, False, False)),
    ((BOTH, DECODE), (False, False, False)),
]


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize(("edits", "expected"), FORKS)
def test_modules_fork_only_where_a_phase_is_edited_alone(
    llama: PreTrainedModel, edits: tuple[Any, ...], expected: tuple[bool, bool, bool], rebuilt: bool
) -> None:
    if rebuilt:  # every edit in a variant of its own
        variant = Variant(llama)
        for phase in edits:
            variant = variant.with_transform(Edit(phase))
    else:
        variant = Variant(llama)
        for phase in edits:
            variant.edit(phase)
    prefill, decode = (variant.modules[phase] for phase in PHASES)
    assert (prefill is llama, decode is llama, prefill is decode) == expected


def test_transforms_added_together_edit_the_same_twins(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forked = list[Any]()

    def counted(model: Any) -> Any:
        forked.append(model)
        return fork(model)

    monkeypatch.setattr("autotune.runtime.variant.fork", counted)
    first = Variant(llama).with_transforms((Edit("decode"), LaterEdit("decode"), Edit("prefill"), LaterEdit("both")))
    assert forked == [llama, llama]
    modules = dict(first.modules)
    second = first.with_transforms((LaterEdit("decode"), LaterEdit("prefill")))
    assert first.modules == modules
    assert not set(map(id, second.modules.values())) & set(map(id, modules.values()))


def test_edit_returns_what_it_made_and_reuses_it(llama: PreTrainedModel) -> None:
    variant = Variant(llama)
    (decode,) = variant.edit("decode")
    assert decode is variant.modules["decode"]
    assert variant.edit("decode") == (decode,)
    prefill, again = variant.edit("both")
    assert (prefill, again) == (variant.modules["prefill"], decode)


def test_a_new_variant_does_not_edit_the_one_before(llama: PreTrainedModel) -> None:
    first = Variant(llama).with_transform(Edit("both", "weights"))
    modules = dict(first.modules)
    second = first.with_transform(LaterEdit("decode", "weights"))
    assert first.modules == modules
    assert second.modules["prefill"] is first.modules["prefill"]
    assert second.modules["decode"] is not first.modules["decode"]
    assert (first.transforms, second.transforms) == (
        (Edit("both", "weights"),),
        (Edit("both", "weights"), LaterEdit("decode", "weights")),
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_transforms_are_applied_in_order_of_their_stages(llama: PreTrainedModel, order: tuple[int, ...]) -> None:
    transforms = (Edit("both"), LaterEdit("decode"), SetThreads("decode", 1))
    given = tuple(transforms[i] for i in order)
    one_by_one = Variant(llama)
    for transform in given:
        one_by_one = one_by_one.with_transform(transform)
    assert Variant(llama).with_transforms(given).transforms == one_by_one.transforms == transforms


def test_what_precedes_the_variants_own_transforms_makes_them_anew_once(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, made, apply = Variant(llama).with_transforms((SetThreads("decode", 1),)), list[str](), SetThreads.apply
    monkeypatch.setattr(SetThreads, "apply", lambda self, variant: (made.append(self.name), apply(self, variant))[1])
    added = LaterEdit("decode"), Edit("both")
    assert served.with_transforms(added).transforms == (Edit("both"), LaterEdit("decode"), SetThreads("decode", 1))
    assert made == ["set-threads"]


def test_dropping_a_variant_frees_its_modules(llama: PreTrainedModel) -> None:
    variant = Variant(llama).with_transforms((Edit("both", "weights"),))
    serving(variant).generate(PROMPT, max_new_tokens=2)
    twin = weakref.ref(variant.modules["decode"])
    del variant
    gc.collect()
    assert twin() is None


def test_threads_are_set_for_the_phase_and_put_back(llama: PreTrainedModel) -> None:
    before, seen = torch.get_num_threads(), {}
    variant = Variant(llama).with_transforms((SetThreads("decode", before + 1),))
    for phase in PHASES:
        with variant.running(phase):
            seen[phase] = torch.get_num_threads()
    assert seen == {"prefill": before, "decode": before + 1}
    assert torch.get_num_threads() == before
    with pytest.raises(VariantError), variant.running("decode"):
        raise ZeroDivisionError("inside")
    assert torch.get_num_threads() == before


def test_a_variant_that_fails_says_in_which_phase(llama: PreTrainedModel) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel")

    variant = Variant(llama).with_transforms((Edit("decode"),))
    variant.modules["decode"].forward = broken
    with pytest.raises(VariantError, match="decode failed: RuntimeError: no such kernel"):
        serving(variant).generate(PROMPT, max_new_tokens=4)
