"""The GPU's benchmarks without a GPU: shapes, figures on paper, and a soak on the fake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autotune.machine import device
from autotune.machine.hardware import Hardware
from autotune.runtime import attention_sdpa
from autotune.runtime.cache import slot_forward
from autotune.runtime.dispatch import serving
from autotune.runtime.steps import compiled
from autotune.runtime.steps.graphs import GraphSteps
from autotune.runtime.variant import Variant
from autotune.transforms import torchao, triton_weights
from autotune.workload import Workload
from benchmarks import gpu, gpu_shapes, gpu_steps, graph_soak
from tests.fakes import varlen
from tests.fakes.cuda import FakeCuda
from tests.models import tiny, token_prompts

H100 = Hardware("cuda", "NVIDIA H100", "9.0", 2, 80 << 30, 2.9e12, {"bfloat16": 700e12}, None, {})
CUDNN = attention_sdpa.KERNELS["cudnn"].name


@pytest.mark.parametrize(("shape", "parameters"), [("1b", 1_498_482_688), ("8b", 8_030_261_248)])
def test_the_gpu_benchmark_is_of_the_class_it_says(shape: str, parameters: int) -> None:
    model = gpu_shapes.random_model(shape, "meta")
    assert (model.num_parameters(), model.dtype) == (parameters, torch.bfloat16)
    prompts = gpu_shapes.random_prompts(model.config.vocab_size, 12, 40)
    assert {len(prompt) for prompt in prompts} == {12}
    assert len(set(map(tuple, prompts))) == len(prompts) == 40


@pytest.fixture
def on_paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a CPU lacks is put in its place: cuDNN, Triton, packed INT4, compiled products and a compiled step."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(attention_sdpa.ON_CPU, "cudnn", replace(attention_sdpa.KERNELS["math"], name=CUDNN))
    monkeypatch.setattr(triton_weights, "_missing", lambda bits, where: None)
    monkeypatch.setattr(torchao, "_missing", lambda scheme, where: None)
    monkeypatch.setattr(torchao, "_compiled", lambda *shape: nn.functional.linear)
    monkeypatch.setattr(torchao, "quantized", lambda weight, scheme: weight)
    monkeypatch.setattr(compiled, "artifact", lambda *given: None)
    step = SimpleNamespace(disable_guard_check=lambda: None, fn=slot_forward.run)
    monkeypatch.setattr(compiled, "compile_ahead", lambda *given: step)
    layers = pytest.importorskip("autotune.runtime.narrow.layers", reason="needs Triton")
    for kind in (layers.NarrowInt8Linear, layers.NarrowInt4Linear):
        monkeypatch.setattr(kind, "product", lambda layer, x: x.float() @ layer.widened(torch.float32).T)
    with varlen.kernel():
        yield


@pytest.mark.usefixtures("on_paper")
@pytest.mark.parametrize("name", gpu_steps.PLANS)
def test_every_plan_can_be_made_and_put_together(name: str) -> None:
    """Each transform is available after the ones before it on an H100, and takes effect in the whole."""
    work = Workload(tuple(map(tuple, token_prompts(2))), 4, (2,))
    with device.stand_in(FakeCuda(opaque=True)):
        variant = Variant(tiny("llama").bfloat16(), workload=work)
        for transform in sorted(gpu_steps.chain(name), key=lambda transform: transform.stage):
            assert transform.unavailable(variant, H100) is None
            variant = variant.with_transform(transform)
        serving(variant).generate(torch.tensor(work.prompts), max_new_tokens=4, min_new_tokens=4)
        assert [transform.took_effect(variant) for transform in variant.transforms] == [None] * len(variant.transforms)


LINEARS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096  # weights of the shape "8b"
NORMS, ROW = (2 * 32 + 1) * 4096 * 2, 4096 * 2  # bytes; a row of the embedding for each sequence
CACHE = 1002 * 32 * 2 * 8 * 128 * 2  # bytes of a sequence: the 1001 tokens that are read and the one written


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("as it is", 16),
        ("graph, cuDNN, merged", 16),
        ("graph, cuDNN, FP8 by torchao", 8),
        ("graph, cuDNN, INT8 by Triton", 8.5),
        ("graph, cuDNN, compiled, merged, INT8", 8.5),
        ("graph, slot attention, compiled, INT8", 8.5),
        ("graph, cuDNN, INT4 by torchao", 5),
        ("graph, cuDNN, INT4 by Triton", 5),
        ("graph, cuDNN, NF4 by bitsandbytes", 4.5),
    ],
)
@pytest.mark.parametrize("batch", [1, 16])
def test_the_paper_says_what_a_token_must_move(
    name: str, bits: float, batch: int, papers: dict[str, list[str]]
) -> None:
    moved = LINEARS * bits / 8 + NORMS + batch * (ROW + CACHE)
    row = papers[f"| {name} | {batch} "]
    assert float(row[2].removesuffix(" GB")) * 1e9 == pytest.approx(moved, abs=0.005e9)
    for gpu_name, rate in {"A100": 2.039e12, "H100": 3.35e12}.items():
        fastest, line = row[3 + list(gpu_steps.DATASHEET).index(gpu_name)].removesuffix(" ms").split(" / ")
        assert float(fastest) == pytest.approx(moved / rate * 1e3, abs=0.0051)
        assert float(line) == pytest.approx(moved / rate * 1e3 / 0.69, abs=0.0051)


@pytest.fixture(scope="module")
def papers() -> dict[str, list[str]]:
    """Plan and number of sequences -> the cells of its row."""
    said = list[str]()
    assert gpu_steps.main(["--paper", "--prompt-tokens", "1000", "--new-tokens", "2"], said.append) == 0
    rows = [line.split(" | ") for line in said if line.startswith("| ")][1:]
    return {" | ".join(row[:2]) + " ": row for row in rows}


def test_the_paper_has_every_plan(papers: dict[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(papers) == [f"| {name} | {batch} " for batch in (1, 16) for name in ("as it is", *gpu_steps.PLANS)]
    assert gpu.main(["--paper", "--shape", "1b", "--batches", "4"]) == 0
    told = capsys.readouterr().out
    assert "1.50e9 parameters in bfloat16, 576 tokens in the cache of each sequence" in told
    assert all(f"| {name} | 4 | " in told for name in gpu_steps.PLANS)
    assert "| as it is | 4 | 2.55 GB |" in told  # 2.47 GB of weights, and 4 times 576 tokens of 32 KiB


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    monkeypatch.setitem(gpu_shapes.SHAPES, "1b", gpu_shapes.COMMON | small | heads)


@pytest.mark.usefixtures("tiny_shapes")
def test_a_step_that_does_not_run_is_a_row_and_the_next_one_runs() -> None:
    said = list[str]()
    asked = ["--device", "cpu", "--shape", "1b", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "2"]
    assert gpu_steps.main([*asked, "--plans", "1,0"], said.append) == 1
    rows = [line for line in said if line.startswith("| ")][2:]
    assert "does not run: cpu devices have no graphs" in rows[0]
    assert rows[1].startswith("| lean loop | 0.00 GB | ")
    assert gpu_steps.main([*asked, "--plans", "0", "--seconds", "0"], said.append) == 0
    assert "not tried" in said[-1]


@pytest.mark.usefixtures("tiny_shapes")
@pytest.mark.parametrize("damage", [False, True])
def test_a_soak_of_graphs_sees_a_graph_that_changes(damage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if damage:
        replay = GraphSteps._replayed
        late = 100  # replays after which a graph gives other logits: more than a new variant needs for its answers
        monkeypatch.setattr(GraphSteps, "_replayed", lambda self, *a: replay(self, *a).roll(self.replays // late, -1))
    with device.stand_in(FakeCuda()):
        made, checked, _, wrong = graph_soak.soak("cpu", 4.0, 1, 0)
    assert made >= 1
    assert checked >= 4
    assert bool(wrong) is damage


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
