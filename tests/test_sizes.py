"""Models of real sizes: the generator on tiny shapes, the table from recorded figures, and one run from end to end."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gguf_file, shapes, sizes
from benchmarks.results import Spread
from benchmarks.shapes import SHAPES, TINY
from benchmarks.size_row import Stage, Watcher
from benchmarks.sizes import CASES, Case, Row, Sizes
from tests.models import ONE_QUESTION

if TYPE_CHECKING:
    from collections.abc import Iterator

# The generator


@pytest.mark.parametrize(
    ("name", "parameters", "fields"),
    [
        ("0.5B", 494_032_768, {"hidden_size": 896, "num_key_value_heads": 2}),
        ("1B", 1_235_814_400, {"head_dim": 64, "num_key_value_heads": 8}),
        ("3B", 3_085_938_688, {"num_hidden_layers": 36, "intermediate_size": 11008}),
    ],
)
def test_shapes_are_the_published_ones(name: str, parameters: int, fields: dict[str, int]) -> None:
    model = shapes.empty(SHAPES[name], torch.bfloat16)
    assert (model.num_parameters(), model.dtype) == (parameters, torch.bfloat16)
    assert {field: getattr(model.config, field) for field in fields} == fields
    assert {case.parameters for case in CASES if case.shape == name} == {parameters}


@pytest.mark.parametrize("name", TINY)
def test_a_model_is_complete_and_the_same_each_time(name: str) -> None:
    model, again = (shapes.build(TINY[name], torch.float32) for _ in range(2))
    narrow, other = shapes.build(TINY[name], torch.bfloat16), shapes.build(TINY[name], torch.float32, seed=1)
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for (key, tensor), twin, half, reseeded in zip(
        model.named_parameters(), again.parameters(), narrow.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(tensor, twin), key
        assert half.dtype == torch.bfloat16
        assert torch.equal(tensor.bfloat16(), half), key
        assert not torch.equal(tensor, reseeded), key
    assert torch.isfinite(model.model.rotary_emb.inv_freq).all()


def test_numbers_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = list(shapes.draw(TINY["tiny"], "model.embed_tokens.weight", torch.Size((512, 64))))
    monkeypatch.setattr(shapes, "ROWS", 128)
    cut = list(shapes.draw(TINY["tiny"], "model.embed_tokens.weight", torch.Size((512, 64))))
    assert (len(parts), len(cut)) == (1, 4)
    assert torch.equal(torch.cat(parts), torch.cat(cut))


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_a_few_columns_of_a_matrix_are_outliers(layer: str) -> None:
    weight = shapes.build(TINY["tiny"], torch.float32).get_submodule(f"model.layers.1.{layer}").weight
    size = weight.square().mean(0).sqrt()
    found = torch.zeros(len(size), dtype=torch.bool)
    found[shapes.outliers(len(size))] = True
    assert 0 < int(found.sum()) <= len(size) // 16
    assert size[found].min() > 2 * size[~found].max()


@torch.no_grad()
def test_the_residual_stream_has_outlier_channels_and_logits_are_sharp() -> None:
    model = shapes.build(TINY["tiny"], torch.float32)
    ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    out = model(ids, output_hidden_states=True)
    size = out.hidden_states[1].square().mean((0, 1)).sqrt()
    outliers = shapes.outliers(64)
    assert size[outliers].min() > 2 * size.median()
    assert 2.0 < float(out.logits.std(-1).mean()) < 6.0
    top = out.logits.argmax(-1)
    assert float((top == ids).float().mean()) < 0.1  # it does not echo
    assert len(top.unique()) > 32  # nor does it say the same whatever it reads


@pytest.mark.parametrize("name", TINY)
def test_a_gguf_file_holds_the_same_model(name: str, tmp_path: Path) -> None:
    gguf_file.write(TINY[name], tmp_path / "tiny.Q8_0.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.Q8_0.gguf", dtype=torch.float32)
    for (key, tensor), (_, stored) in zip(
        shapes.build(TINY[name], torch.float32).named_parameters(), read.named_parameters(), strict=True
    ):
        assert float((tensor - stored.detach()).abs().max()) <= float(tensor.abs().max()) / 127, key


def test_rotary_factors_are_those_of_the_published_scaling() -> None:
    factors = gguf_file.rotary_factors(SHAPES["1B"])
    assert factors is not None
    assert (len(factors), factors[0], factors[-1]) == (32, pytest.approx(1.0), pytest.approx(32.0))
    assert gguf_file.rotary_factors(SHAPES["0.5B"]) is None


# The table


@pytest.fixture
def row() -> Row:
    """0.5B in BF16, with round figures."""
    found = Row("0.5B-bf16", "0.5B", "bf16", 600.0)
    found.take(
        {
            "model_bytes": 1_000_000_000,
            "process_bytes": 300_000_000,
            "loaded_bytes": 1_300_000_000,
            "tune_s": 480.0,
            "peak_bytes": 1_700_000_000,
            "tuned_bytes": 1_600_000_000,
            "promised_bytes": 1_500_000_000,
            "state": "tuned",
            "verdict": "decode 2.00x",
            "plan": ["weight_only(bits=8, group=32)@decode", "step_program@decode"],
            "stages": [["profiling", 0.0, 1_400_000_000], ["confirming", 9.0, 1_700_000_000]],
            "samples": {
                "original": {"ttft": [900.0, 1000.0], "tpot": [100.0, 120.0]},
                "plan": {"ttft": [500.0, 400.0], "tpot": [50.0, 50.0]},
            },
            "read_bytes": {"original": 1_000_000_000, "plan": 500_000_000},
            "bandwidth_bytes_per_s": 20e9,
            "llama": {"ttft": [600.0], "tpot": [40.0]},
        }
    )
    return found


def table_of(*rows: Row) -> str:
    return sizes.markdown(Sizes("2026-01-01T00:00:00+00:00", 2, list(rows)))


def test_figures_of_a_row(row: Row) -> None:
    assert row.speedup == Spread(pytest.approx(2.2), 2.0, pytest.approx(2.4))
    assert (row.share("original"), row.share("plan")) == (pytest.approx(0.4545, rel=1e-3), 0.5)
    assert (row.peak_ratio, row.own_peak_ratio) == (1.7, pytest.approx(1.4))
    assert row.highest == ("confirming", 1_700_000_000)
    assert row.shortfalls == []
    assert json.loads(json.dumps(asdict(row)))["samples"]["plan"]["tpot"] == [50.0, 50.0]


def test_a_row_in_the_table(row: Row) -> None:
    report = table_of(row)
    assert "| 0.5B-bf16 | 1.00 | 480 | 1.70 | 1.70 | 1.40 | 1.60 (1.50) | - (-) |" in report
    assert "| 950 (900-1000) | 450 (400-500) | 600 (600-600) | 110 (100-120) | 50.0 (50.0-50.0) |" in report
    assert "| 2.20x (2.00-2.40) | 45% | 50% |" in report
    assert "missed" not in report


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tune_s": 601.0}, "tuning took 601 s, 600 s are the target"),
        ({"shape": "3B", "tune_s": 1100.0}, None),
        ({"peak_bytes": 1_900_000_000}, "1.90x the model was resident, 1.8x is the target, while 'confirming'"),
        ({"dtype": "fp32"}, "decode is 2.20x as fast, 2.5x is the target"),
        ({"samples": {"original": {"ttft": [1.0], "tpot": [1.0]}}}, "no plan was committed, 1.5x is the target"),
        ({"samples": {}}, None),  # it failed, which says why
        ({"shape": "tiny", "tune_s": 9999.0}, None),
    ],
)
def test_missed_targets_are_told(row: Row, change: dict[str, Any], told: str | None) -> None:
    row = replace(row, **change)
    assert row.shortfalls == ([told] if told else [])
    assert told is None or f"* 0.5B-bf16: missed: {told}" in table_of(row)


def test_what_is_missing_is_a_dash_with_its_reason(row: Row) -> None:
    failed = Row("3B-bf16", "3B", "bf16", 1200.0, failure="its process died of SIGKILL", llama_missing="no llama_cpp")
    row.llama = {}
    row.stderr = ["Traceback", "KeyError"]
    report = table_of(failed, row)
    assert "| 3B-bf16 | - | - | missing | - | - | missing | - | - | - |" in report
    assert "* 3B-bf16: failed: its process died of SIGKILL" in report
    assert "* 3B-bf16: llama.cpp is missing: no llama_cpp" in report
    assert "* 0.5B-bf16: 2 lines on standard error, the first: Traceback" in report


def test_an_answer_that_no_row_has_a_place_for_is_an_error(row: Row) -> None:
    with pytest.raises(AttributeError, match="'tempo'"):
        row.take({"tempo": 1})


# The run


def test_peaks_are_booked_under_what_was_going_on() -> None:
    looks: Iterator[int] = iter([1, 5, 3, 4])
    watcher = Watcher(look=lambda: next(looks))
    watcher._start = 0.0
    watcher.measure()
    watcher.note("profiling")  # looks once more at the stage that ends
    watcher.note("profiling")
    watcher.measure()
    watcher.measure()
    assert [(stage.name, stage.peak_bytes) for stage in watcher.stages] == [("beginning", 5), ("profiling", 4)]
    assert isinstance(watcher.stages[0], Stage)


def test_a_model_that_does_not_fit_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "available_bytes", lambda: 8 * 10**9)
    given, case = sizes.options(["--only", "3B-bf16"]), CASES[-1]
    assert sizes.measure(case, given, tmp_path, lambda line: None).failure == "it needs 12.3 GB, 8.0 GB are free"


def test_a_process_that_dies_leaves_its_reason(tmp_path: Path) -> None:
    given = sizes.options(["--tiny"])
    row = sizes.measure(Case("no such shape", "fp32", 1), given, tmp_path, lambda line: None)
    assert row.failure == "KeyError: 'no such shape'"
    assert row.model_bytes is None


MISSING = [pytest.param("no-such-interpreter", "No such file", id="no interpreter")]
if importlib.util.find_spec("llama_cpp") is None:
    MISSING.append(pytest.param(sys.executable, "No module named 'llama_cpp'", id="no library"))


@pytest.mark.parametrize(("python", "told"), MISSING)
def test_llama_cpp_may_be_missing(python: str, told: str, tmp_path: Path) -> None:
    given = sizes.options(["--tiny", "--peers-python", python])
    assert told in sizes.rival("tiny", given, tmp_path, lambda line: None)["llama_missing"]


def test_rows_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [case.name for case in sizes.options(["--only", "1B-bf16,0.5B-fp32"]).cases] == ["0.5B-fp32", "1B-bf16"]
    assert sizes.options([]).cases == list(CASES)
    assert {case.budget_s for case in CASES if case.shape != "3B"} == {600.0}
    with pytest.raises(SystemExit):
        sizes.options(["--only", "7B-bf16"])
    assert "there is no row 7B-bf16" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quick.toml").write_text(ONE_QUESTION)
    arguments = ["--tiny", "--only", "tiny-bf16", "--rounds", "2", "--budget", "20", "--threads", "1"]
    arguments += ["--policy", str(tmp_path / "quick.toml"), "--caches", str(cache), "--out", str(tmp_path)]
    assert sizes.main(arguments) == 0
    (row,) = json.loads((tmp_path / "sizes.json").read_text())["rows"]
    assert row["failure"] == ""
    assert row["state"] in ("tuned", "original")
    assert row["model_bytes"] == pytest.approx(2 * 106_944, rel=0.01)
    assert row["peak_bytes"] >= row["loaded_bytes"] > row["process_bytes"]
    assert row["trials"]
    assert len(row["samples"]["original"]["tpot"]) == 2
    assert [stage[0] for stage in row["stages"]][:2] == ["beginning", "measuring the hardware"]
    assert "| tiny-bf16 | 0.00 |" in capsys.readouterr().out
