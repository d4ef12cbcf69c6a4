"""Checkpoints of strangers: each is one clear sentence and a documented exit code, or works."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotune import cli
from autotune.report.exit_codes import Code
from tests import models
from tests.model.test_load import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    models.tiny("llama").save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    prompts = "\n".join(json.dumps({"prompt": ids}) for ids in models.token_prompts(24, 8))
    (folder.parent / "ids.jsonl").write_text(prompts)
    return folder


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content.encode() if isinstance(content, str) else content))


def void(_: object) -> None: ...


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def no_tokenizer(folder: Path) -> None:
    for found in folder.glob("tokenizer*"):
        found.unlink()


def a_folder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def a_pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def a_loop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return change


def cut(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def weighed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def short(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"].fill_(float("nan"))


def headed(length: int, header: bytes) -> bytes:
    return struct.pack("<Q", length) + header


def sharded(index: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(index if isinstance(index, str) else json.dumps(index))

    return change


def pickled(folder: Path) -> None:
    """Weights that would run a command if they were unpickled."""

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "ran",)

    (folder / WEIGHTS).unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


ESCAPE = "\x1b]0;owned\x07\x1b[31m"
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (emptied, "has no config.json"),
    "no config": (without(CONFIG), "has no config.json"),
    "config is a folder": (a_folder(CONFIG), "has no config.json"),
    "config is a pipe": (a_pipe(CONFIG), "has no config.json"),
    "config is a loop": (a_loop(CONFIG), "has no config.json"),
    "config is empty": (written(CONFIG, ""), ""),
    "config is cut": (cut(CONFIG, 0.5), ""),
    "config is junk": (written(CONFIG, bytes(range(256))), ""),
    "config is a list": (written(CONFIG, "[]"), ""),
    "config is nothing": (written(CONFIG, "{}"), ""),
    "config is null": (written(CONFIG, "null"), ""),
    "config is nested": (written(CONFIG, "[" * 100_000), ""),
    "config is nested in a key": (
        written(CONFIG, '{"model_type": "llama", "x": ' + "[" * 50_000 + "]" * 50_000 + "}"),
        "",
    ),
    "unknown type": (configured(model_type="homemade"), "homemade"),
    "type is a number": (configured(model_type=7), ""),
    "type is a list": (configured(model_type=["llama"]), ""),
    "type with escapes": (configured(model_type=f"{ESCAPE}llama"), ""),
    "architecture is another": (configured(architectures=["BertModel"]), "BertModel"),
    "architecture with escapes": (configured(architectures=[f"{ESCAPE}Evil"]), "Evil"),
    "architectures is text": (configured(architectures="BertModel"), "is a BertModel"),
    "architectures holds a number": (configured(architectures=[7]), "is a 7"),
    "encoder-decoder": (configured(is_encoder_decoder=True), "encoder-decoder"),
    "remote code": (configured(model_type="x", auto_map={"AutoConfig": "evil.Evil"}), "not run here"),
    "no heads": (configured(num_attention_heads=0), ""),
    "negative layers": (configured(num_hidden_layers=-1), "num_hidden_layers: -1"),
    "layers are text": (configured(num_hidden_layers="many"), ""),
    "layers are missing in the file": (configured(num_hidden_layers=3), "lacks 9 of the weights"),
    "a billion layers": (configured(num_hidden_layers=10**9), "cannot hold them"),
    "a huge vocabulary": (configured(vocab_size=10**12), ""),
    "a negative vocabulary": (configured(vocab_size=-5), "vocab_size: -5"),
    "an odd size": (configured(hidden_size=65), ""),
    "another size": (configured(intermediate_size=8), "other shapes than its configuration"),
    "unknown activation": (configured(hidden_act=f"{ESCAPE}evil"), "evil"),
    "unknown dtype": (configured(dtype="float7"), ""),
    "rope of an unknown type": (configured(rope_parameters={"rope_type": "evil", "rope_theta": 1e4}), ""),
    "rope is text": (configured(rope_parameters="evil"), ""),
    "quantised by a package that is not here": (configured(quantization_config={"quant_method": "aqlm"}), ""),
    "quantisation is text": (configured(quantization_config="evil"), ""),
    "no weights": (without(WEIGHTS), ""),
    "weights are a folder": (a_folder(WEIGHTS), ""),
    "weights are empty": (written(WEIGHTS, ""), ""),
    "weights are cut in the header": (cut(WEIGHTS, 0.001), ""),
    "weights are cut": (cut(WEIGHTS, 0.9), ""),
    "weights are junk": (written(WEIGHTS, bytes(range(256)) * 64), ""),
    "a header of any length": (written(WEIGHTS, headed(2**63, b"{}")), ""),
    "a header that is no JSON": (written(WEIGHTS, headed(4, b"{{{{")), ""),
    "a header that lies": (
        written(WEIGHTS, headed(66, b'{"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,9]}}')),
        "",
    ),
    "weights of another model": (
        lambda folder: save_file({"x": torch.ones(3)}, folder / WEIGHTS, {"format": "pt"}),
        "lacks",
    ),
    "one weight is missing": (weighed(lambda t: t.pop("model.norm.weight")), "lacks 1 of the weights"),
    "one weight is short": (weighed(short), "other shapes"),
    "weights are not finite": (weighed(not_finite), "NaN or infinite logits"),
    "index without shards": (sharded({"metadata": {}, "weight_map": {"model.norm.weight": "gone.safetensors"}}), ""),
    "index is junk": (sharded("{"), ""),
    "index is a list": (sharded([1]), ""),
    "index leads elsewhere": (
        sharded({"metadata": {}, "weight_map": {"model.norm.weight": "../../../etc/passwd"}}),
        "",
    ),
    "a pickle that runs": (pickled, ""),
    "tokenizer is junk": (written(TOKENIZER, bytes(range(256))), "the tokenizer of"),
    "tokenizer is cut": (cut(TOKENIZER, 0.5), "the tokenizer of"),
    "tokenizer is a list": (written(TOKENIZER, "[]"), "the tokenizer of"),
    "tokenizer is a folder": (a_folder(TOKENIZER), "the tokenizer of"),
    "tokenizer's settings are junk": (written("tokenizer_config.json", "{"), "the tokenizer of"),
}
FINE: dict[str, Callable[[Path], None]] = {
    "as it is": void,
    "quantised by nobody": configured(quantization_config={"quant_method": "evil"}),
    "no tokenizer": no_tokenizer,
    "generation settings are junk": written("generation_config.json", "{"),
    "a file too many": written("notes.txt", "remember the milk"),
    "a weight too many": weighed(lambda t: t.update(extra=torch.ones(2))),
    "a name with escapes": configured(_name_or_path=f"{ESCAPE}name"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def record(whole: Path, change: Callable[[Path], None], tmp_path: Path) -> int:
    shutil.copytree(whole, tmp_path / "model")
    change(tmp_path / "model")
    argv = ["check", "record", "model", "--out", "new", "--no-latency", "--prompts", str(whole.parent / "ids.jsonl")]
    return cli.main(argv)


@pytest.mark.fault("F78")
@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_checkpoint_is_one_sentence(
    whole: Path, change: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = record(whole, change, tmp_path)
    out, err = capsys.readouterr()
    assert code == Code.USAGE, err
    assert not out
    (line,) = [line for line in err.splitlines() if line.startswith("autotune: ")]
    assert said in line
    assert "model" in line or "the original" in line
    assert len(line) < 700
    for never in ("unexpected", "Traceback", "\x1b", "\x07"):
        assert never not in err
    assert not (tmp_path / "model" / "ran").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", FINE.values(), ids=FINE.keys())
def test_what_does_no_harm_is_recorded(
    whole: Path, change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record(whole, change, tmp_path) == Code.DONE
    out, err = capsys.readouterr()
    assert "Recorded" in out
    assert "\x1b" not in out + err
    assert (tmp_path / "new" / "manifest.json").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.95])
def test_a_gguf_file_that_is_cut_is_one_sentence(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", models.tiny("llama"))
    cut("tiny.gguf", share)(tmp_path)
    assert cli.main(["check", "record", "tiny.gguf", "--out", "new", "--no-latency"]) == Code.USAGE
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("autotune: ")]
    assert "tiny.gguf cannot be read as a GGUF model" in line
    assert not list((tmp_path / "cache" / "models").iterdir())
