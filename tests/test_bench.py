"""The search's measuring side: what a candidate leaves behind, and what only the largest request shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotune import device, policy
from autotune.bench import LiveBench
from autotune.errors import DeviceError
from autotune.sites import stored_bytes
from autotune.transforms import Transform
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.linear_dtype import LinearDtype
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.weight_only import WeightOnly
from autotune.validate.score import Served
from autotune.variant import Variant
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.models import tiny, token_prompts


def bench_of(model: Any, batches: tuple[int, ...] = (1, 4)) -> LiveBench:
    work = Workload(tuple(map(tuple, token_prompts(8))), new_tokens=4, batch_sizes=batches)
    return LiveBench(Variant(model, None, work), work, policy.load("balanced"), None, notify=str)  # type: ignore[arg-type]


def exhausted_beyond(bench: LiveBench, rows: int, error: Exception) -> Variant:
    """A variant that fails for more sequences than `rows`."""
    variant = bench.original.with_transform(LeanLoop(phase="decode"))
    (module,) = variant.edit("decode")
    forward = module.forward

    def limited(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(ids) > rows:
            raise error
        return forward(ids, *args, **kwargs)

    module.forward = limited  # type: ignore[method-assign]
    return variant


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nGPU 0 has ...")


@pytest.mark.fault("A14")
@pytest.mark.parametrize(
    ("rows", "said"),
    [(4, None), (3, "largest request (4 x "), (1, "out of memory")],
    ids=["fits", "does not", "memory"],
)
def test_what_only_the_largest_request_shows(rows: int, said: str | None) -> None:
    with device.stand_in(FakeCuda()) as fake:
        bench = bench_of(tiny("llama"))
        found = bench.stress(exhausted_beyond(bench, rows, MEMORY))
    assert (found is None) == (said is None)
    assert said is None or said in str(found)
    assert fake.trims == (0 if said is None else 1)  # type: ignore[attr-defined]


ERRORS = [
    (MEMORY, "out of memory: CUDA out of memory. Tried to allocate 2 GiB"),
    (ZeroDivisionError("oops"), "ZeroDivisionError: oops"),
    (ValueError(), "ValueError: "),
]


@pytest.mark.parametrize(("error", "said"), ERRORS, ids=["memory", "one line", "no line"])
def test_what_a_candidate_raised_in_words(error: Exception, said: str) -> None:
    assert bench_of(tiny("llama")).explain(error) == said


def test_a_dead_device_is_no_candidates_failure() -> None:
    with device.stand_in(FakeCuda()):
        bench = bench_of(tiny("llama"))
        death = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(DeviceError, match="restart the process"):
            bench.explain(death)
    for call in (bench.stress, lambda variant: Served(variant, 0).step([(1, 2, 3)], [(4, 5)])):
        with device.stand_in(FakeCuda()), pytest.raises(DeviceError, match="restart the process"):
            call(exhausted_beyond(bench, 0, death))


@pytest.mark.parametrize(
    "transform",
    [WeightOnly("decode"), WeightOnly("both", bits=4), LinearDtype("prefill")],
    ids=str,
)
def test_what_a_transform_takes_is_known_before_it_is_tried(transform: Transform) -> None:
    original = Variant(tiny("qwen3"))
    predicted = transform.extra_bytes(original)
    modules = original.with_transform(transform).modules.values()
    assert predicted == stored_bytes(original.original, *modules) - stored_bytes(original.original) > 0


@pytest.mark.parametrize("transform", [StaticCache("decode", 128), CompileStep("decode", slots=128)], ids=str)
def test_slots_take_memory_on_a_gpu(transform: Transform) -> None:
    original = bench_of(tiny("llama"), batches=(1, 4)).original
    assert transform.extra_bytes(original) == 0
    with device.stand_in(FakeCuda()):
        assert transform.extra_bytes(original) == 2 * 2 * 4 * 128 * 2 * 16 * 4  # K and V, layers, batch, slots, heads
        assert transform.extra_bytes(original.with_transform(StaticCache("decode"))) == 0
