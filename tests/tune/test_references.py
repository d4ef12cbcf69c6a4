"""What the original said is kept between runs: judged with it as without, bounded, and no file can do harm."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes

from autotune.errors import AutotuneError
from autotune.machine import cache_dir
from autotune.model import stateful
from autotune.model.configured import end_ids
from autotune.runtime.variant import Variant
from autotune.transforms.dynamic_int8 import DynamicInt8
from autotune.tune import plan as plans
from autotune.tune import policy, references, tensor_file
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.references import References
from autotune.tune.tuned import Tuned
from autotune.validate.answers import Answers
from autotune.validate.exam import Exam
from autotune.validate.quality import judge
from autotune.validate.sensitivity import LayerProbe
from autotune.validate.tiers import SIZES
from autotune.workload import Workload
from tests.models import PAD, VOCABULARY, tiny, token_prompts

IDENTITY = Fingerprint("m" * 32, "cpu, Some CPU, AVX2, 2 threads", {"torch": "2.13.0"}, "w", "balanced:1", "strict")
PROMPTS = tuple(map(tuple, token_prompts(16, length=48)))
MKLDNN: Any = torch.backends.mkldnn  # which says nothing of its `matmul`
INT8 = DynamicInt8(phase="both")  # nothing of the original is left to run


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny("llama", max_position_embeddings=1024)
    stateful.of(model)  # which runs it
    return model


@pytest.fixture
def asked(model: Any) -> Iterator[list[int]]:
    """One for every forward of the original: its aliases share what is below the head, twins have their own."""
    calls: list[int] = []
    shared = model.model
    hook = shared.register_forward_pre_hook(lambda module, _: calls.append(1) if module is shared else None)
    yield calls
    hook.remove()


def prepared(model: Any, kept: References | None = None, like: Exam | None = None) -> Exam:
    return Exam.prepare(model, PROMPTS, pad_token_id=PAD, kept=kept, like=like)


def blank(model: Any) -> Exam:
    """The exam before the original is asked anything."""
    exam = Exam(model, SIZES["quick"], PAD, end_ids(model.generation_config))
    exam.prompts = exam._choose(PROMPTS)
    return exam


@pytest.fixture(scope="module")
def said(model: Any) -> Answers:
    """All that the original may be asked."""
    exam = prepared(model)
    for k, group in enumerate(exam.groups()):
        exam.reference(group, stepped=k == 1)
    exam.reference(exam.texts[1:2])
    probe = LayerProbe(exam, Variant(model), INT8, "strict")
    assert all(len(probe._kept(k)) for k in range(len(probe.batches)))
    answers = exam.answers()
    assert answers is not None
    return answers


def knowing(model: Any, answers: Answers) -> Exam:
    """An exam that has these answers, none of them kept."""
    exam = blank(model)
    exam.take(replace(answers, logits=dict(answers.logits)))  # a shelf of its own
    exam._taken = -1
    return exam


@pytest.fixture
def path(model: Any, said: Answers) -> Path:
    """Where all answers are kept."""
    kept, exam = References(IDENTITY), knowing(model, said)
    kept.save(exam)
    found = kept.path(exam)
    assert found is not None
    assert found.exists()
    return found


# --- the same verdict, without the original ---


def test_an_exam_with_kept_answers_judges_as_one_without_and_never_asks(model: Any, asked: list[int]) -> None:
    found, kept = [], References(IDENTITY)
    for run in ("plain", "first", "second"):
        exam = prepared(model, None if run == "plain" else kept)
        quality = judge(exam, Variant(model).with_transform(INT8), "relaxed")
        shortfall = LayerProbe(exam, Variant(model), INT8, "strict").shortfall("lm_head")
        found.append((exam.texts, exam.noise_kld, exam.tie_nats, quality, shortfall))
        assert bool(asked) == (run != "second")
        asked.clear()
        if run == "first":
            kept.save(exam)
    assert found[0] == found[1] == found[2]
    assert found[0][3].tokens > 1000
    assert 1e-6 < found[0][3].mean_kld < 1.0


def test_only_what_is_missing_is_asked_for_and_added(model: Any, said: Answers, asked: list[int]) -> None:
    names = [name for name in said.logits if name.endswith(".read")]
    kept = References(IDENTITY)
    kept.save(knowing(model, replace(said, logits={name: said.logits[name] for name in names[:5]})))
    for missing in (len(names) - 5, 0):
        asked.clear()
        exam = prepared(model, kept)
        read = [exam.reference(group) for group in exam.groups()]
        assert len(asked) == missing
        assert all(
            torch.equal(exam.reference(group), logits) for group, logits in zip(exam.groups(), read, strict=True)
        )
        kept.save(exam)


def test_what_is_kept_is_what_was_said(model: Any, said: Answers, path: Path) -> None:
    exam = blank(model)
    assert References(IDENTITY).restore(exam)
    assert exam.answers() is None  # nothing new
    exam._taken = -1
    again = exam.answers()
    assert again is not None
    assert (again.own, again.noise, again.logits.keys()) == (said.own, said.noise, said.logits.keys())
    assert all(torch.equal(again.logits[name], logits) for name, logits in said.logits.items())
    assert {name.rpartition(".")[2] for name in said.logits} >= {"read", "stepped", "0", "3"}
    with safe_open(path, "pt") as file:  # as the library reads it
        assert file.keys() == sorted(said.logits)


def test_nothing_is_written_where_nothing_is_new(model: Any, path: Path) -> None:
    before = path.stat().st_ino
    kept = References(IDENTITY)
    kept.save(prepared(model, kept))
    assert path.stat().st_ino == before


def test_noise_that_another_exam_measured_is_not_kept_as_this_ones(model: Any) -> None:
    kept, like = References(IDENTITY), prepared(model)
    like.noise_kld = 0.01
    like.tie_nats = 0.2
    kept.save(prepared(model, kept, like))
    for exam, noise in ((prepared(model, kept), prepared(model)), (prepared(model, kept, like), like)):
        assert (exam.noise_kld, exam.tie_nats) == (noise.noise_kld, noise.tie_nats)


@pytest.mark.parametrize("change", [{"problem": "it does not reproduce itself"}, {"texts": ()}])
def test_an_exam_that_judges_nothing_is_not_kept(model: Any, said: Answers, change: dict[str, Any]) -> None:
    kept, exam = References(IDENTITY), replace(knowing(model, said), **change)
    kept.save(exam)
    assert not kept.restore(blank(model))


def test_logits_that_are_none_are_not_kept(model: Any, said: Answers) -> None:
    exam = knowing(model, said)
    name = next(iter(exam._kept))
    damaged = torch.full_like(exam._kept[name], torch.nan)
    exam._kept.drop(name)
    exam._kept.put(name, damaged)
    answers = exam.answers()
    assert answers is not None
    assert said.logits.keys() - answers.logits.keys() == {name}


# --- what the answers depend on ---

EXAM: dict[str, Callable[[Exam], Exam]] = {
    "size": lambda exam: replace(exam, size=replace(exam.size, own=8)),
    "prompts": lambda exam: replace(exam, prompts=exam.prompts[::-1]),
    "padding": lambda exam: replace(exam, pad_token_id=3),
    "ends": lambda exam: replace(exam, eos_token_ids=(2, 3)),
    "seed": lambda exam: replace(exam, seed=1),
}


@pytest.mark.parametrize("change", EXAM.values(), ids=EXAM.keys())
def test_another_exam_has_another_file(model: Any, path: Path, change: Callable[[Exam], Exam]) -> None:
    assert References(IDENTITY).path(change(blank(model))) != path


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"model": "n" * 32}, False),
        ({"model": "../../../etc/passwd"}, False),
        ({"hardware": "cpu, Some CPU, AVX2, 1 threads"}, False),
        ({"versions": {"torch": "2.13.1"}}, False),
        ({"versions": {"torch": "2.13.0", "autotune": "0.2"}}, False),
        ({"workload": "v", "policy": "fast:2", "tier": "lossless"}, True),
    ],
)
def test_another_model_machine_or_release_has_another_file(
    model: Any, path: Path, change: dict[str, Any], same: bool
) -> None:
    found = References(replace(IDENTITY, **change)).path(blank(model))
    assert found is not None
    assert found.parent == path.parent
    assert (found == path) == same


@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        (references, "SCHEMA", references.SCHEMA + 1),
        (MKLDNN.matmul, "fp32_precision", "bf16"),
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        ("the model", "get_experts_implementation", lambda: "grouped_mm"),
    ],
    ids=["schema", "precision on a CPU", "precision on a GPU", "experts"],
)
def test_so_has_another_way_to_compute_it(model: Any, path: Path, holder: Any, name: str, value: Any) -> None:
    owner = model if holder == "the model" else holder
    before = getattr(owner, name)
    setattr(owner, name, value)  # monkeypatch cannot restore torch's properties
    try:
        assert References(IDENTITY).path(blank(model)) != path
    finally:
        setattr(owner, name, before)
    assert References(IDENTITY).path(blank(model)) == path


# --- files that do not fit ---


def forged(
    said: Answers, *, own: Any = None, noise: Any = None, logits: dict[str, torch.Tensor] | None = None, **about: Any
) -> bytes:
    """A file with a right digest."""
    tensors = dict(said.logits) if logits is None else logits
    text = json.dumps({"own": own or said.own, "noise": noise or said.noise, **about})
    digest = header(tensor_file.head(text, tensors))["__metadata__"]["digest"]
    return to_bytes(tensors, {"about": text, "digest": digest})


def edited(said: Answers, edit: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    """A file whose first logits are others, with a right digest."""
    name, first = next(iter(said.logits.items()))
    return forged(said, logits={**said.logits, name: edit(first.clone()).contiguous()})


def header(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found


def headed(content: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """A file with another header over the same data."""
    head = header(content)
    text = json.dumps(edit(head) or head).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


def first(head: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(value for name, value in head.items() if name != "__metadata__")
    return found


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


class _Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was run",)


TORN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "a header alone": lambda content: content[: 8 + int.from_bytes(content[:8], "little")],
    "truncated": lambda content: content[:-1000],
    "longer": lambda content: content + bytes(8),
    "zeroed": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "one bit of the data": lambda content: flipped(content, len(content) - 3),
    "one bit of a continuation": lambda content: content.replace(b"[[", b"[[1", 1)[:-1],
    "binary": lambda content: bytes(range(256)) * 64,
    "a pickle": lambda content: pickle.dumps(_Canary()),
    "a header of exabytes": lambda content: (1 << 62).to_bytes(8, "little") + content[8:],
    "a header of all bytes": lambda content: b"\xff" * 8 + content[8:],
    "deeply nested": lambda content: (10**6).to_bytes(8, "little") + b"[" * 10**6,
    "data of petabytes": lambda content: headed(content, lambda head: first(head).update(data_offsets=[0, 1 << 50])),
    "a shape of petabytes": lambda content: headed(content, lambda head: first(head).update(shape=[1 << 40, 1 << 10])),
    "a shape that overflows": lambda content: headed(content, lambda head: first(head).update(shape=[1 << 63, 4])),
    "a negative shape": lambda content: headed(content, lambda head: first(head).update(shape=[-1, 32, VOCABULARY])),
    "another order": lambda content: headed(content, lambda head: first(head).update(shape=first(head)["shape"][::-1])),
    "an unknown type": lambda content: headed(content, lambda head: first(head).update(dtype="PICKLE")),
    "half the type": lambda content: headed(content, lambda head: first(head).update(dtype="U8")),
    "no metadata": lambda content: headed(content, lambda head: head.pop("__metadata__") and None),
    "another digest": lambda content: headed(content, lambda head: head["__metadata__"].update(digest="0" * 64)),
    "another noise": lambda content: headed(
        content, lambda head: head["__metadata__"].update(about=head["__metadata__"]["about"].replace("0.05", "0.06"))
    ),
}

FOREIGN: dict[str, Callable[[Answers], bytes]] = {
    "float32": lambda said: edited(said, torch.Tensor.float),
    "bfloat16": lambda said: edited(said, torch.Tensor.bfloat16),
    "int16": lambda said: edited(said, lambda t: t.view(torch.int16)),
    "another vocabulary": lambda said: forged(said, logits={n: t[..., 1:] * 0 for n, t in said.logits.items()}),
    "fewer tokens": lambda said: edited(said, lambda t: t[:, 1:]),
    "more rows": lambda said: edited(said, lambda t: torch.cat([t, t])),
    "fewer dimensions": lambda said: edited(said, lambda t: t[0]),
    "no rows": lambda said: edited(said, lambda t: t[:0]),
    "NaN": lambda said: edited(said, lambda t: t.fill_(torch.nan)),
    "one NaN": lambda said: edited(said, lambda t: t.index_fill_(-1, torch.tensor([7]), torch.nan)),
    "infinite": lambda said: edited(said, lambda t: t.index_fill_(-1, torch.tensor([7]), torch.inf)),
    "random numbers": lambda said: edited(said, torch.randn_like),
    "another question": lambda said: forged(said, logits={"0" * 32 + ".read": torch.zeros(1, 32, VOCABULARY).half()}),
    "a path": lambda said: forged(said, logits={"../../plans/x": torch.zeros(1, 32, VOCABULARY).half()}),
    "NaN noise": lambda said: forged(said, noise=[float("nan"), 0.05]),
    "null noise": lambda said: forged(said, noise=[None, 0.05]),
    "negative noise": lambda said: forged(said, noise=[-1e-3, 0.05]),
    "as much noise as excuses all": lambda said: forged(said, noise=[0.06, 0.05]),
    "no ties": lambda said: forged(said, noise=[1e-6, 0.0]),
    "endless ties": lambda said: forged(said, noise=[1e-6, 1e999]),
    "noise in words": lambda said: forged(said, noise="none"),
    "one number of noise": lambda said: forged(said, noise=[1e-6]),
    "no texts": lambda said: forged(said, own=[[]] * 16),
    "too few texts": lambda said: forged(said, own=said.own[1:]),
    "a short text": lambda said: forged(said, own=[said.own[0][:-1], *said.own[1:]]),
    "a long text": lambda said: forged(said, own=[(*said.own[0], 5), *said.own[1:]]),
    "a text that goes on": lambda said: forged(said, own=[(2,) * 16, *said.own[1:]]),
    "other texts": lambda said: forged(said, own=[(7,) * 16, *said.own[1:]]),
    "a token beyond the vocabulary": lambda said: forged(said, own=[(VOCABULARY,) * 16, *said.own[1:]]),
    "a negative token": lambda said: forged(said, own=[(-1,) * 16, *said.own[1:]]),
    "tokens in words": lambda said: forged(said, own=[["a"] * 16, *said.own[1:]]),
    "true for a token": lambda said: forged(said, own=[[True] * 16, *said.own[1:]]),
    "an unknown key": lambda said: forged(said, problem="nothing can be judged"),
}


def refused(model: Any, caplog: pytest.LogCaptureFixture) -> str:
    """Why nothing is restored; the exam is as it was."""
    caplog.set_level(logging.DEBUG, "autotune")
    exam = blank(model)
    assert not References(IDENTITY).restore(exam)
    assert (exam.problem, dict(exam._kept), exam._noise) == (None, {}, None)
    (record,) = [r for r in caplog.records if r.name == "autotune"]
    assert record.levelno == logging.DEBUG
    return record.getMessage()


@pytest.mark.fault("F73")
@pytest.mark.parametrize("tear", TORN.values(), ids=TORN.keys())
def test_a_torn_file_is_a_miss_and_removed(
    model: Any, path: Path, tear: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    content = path.read_bytes()
    path.write_bytes(tear(content))
    assert path.read_bytes() != content
    assert str(path) in refused(model, caplog)
    assert not path.exists()


@pytest.mark.fault("F73")
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_so_is_one_that_is_whole_and_does_not_fit(
    model: Any, said: Answers, path: Path, make: Callable[[Answers], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(make(said))
    assert str(path) in refused(model, caplog)
    assert not path.exists()


def test_forging_is_possible(model: Any, said: Answers, path: Path) -> None:
    """Or the table above would prove nothing."""
    path.write_bytes(forged(said))
    assert References(IDENTITY).restore(blank(model))
    path.write_bytes(edited(said, lambda t: t))
    assert References(IDENTITY).restore(blank(model))


def test_after_a_bad_file_the_exam_is_prepared_as_ever(model: Any, said: Answers, path: Path) -> None:
    path.write_bytes(forged(said, own=[(7,) * 16, *said.own[1:]]))
    exam, plain = prepared(model, References(IDENTITY)), prepared(model)
    assert (exam.texts, exam.noise_kld, exam.tie_nats) == (plain.texts, plain.noise_kld, plain.tie_nats)


def test_of_layers_compared_another_way_the_original_is_asked_again(model: Any, said: Answers) -> None:
    halves = {n: t[:, ::2] if n.startswith("at-once") else t for n, t in said.logits.items()}
    exam = knowing(model, replace(said, logits=halves))
    probe = LayerProbe(exam, Variant(model), INT8, "strict")
    assert len(probe.batches) == 4
    assert all(torch.equal(probe._kept(k), said.logits[f"at-once.{k}"]) for k in range(4))


def _link(path: Path) -> None:
    path.rename(path.with_name("target"))
    path.symlink_to("target")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _too_large(path: Path) -> None:
    os.truncate(path, references.MOST_BYTES)  # sparse


@pytest.mark.fault("F75")
@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (_link, "symbolic link"),
        (_pipe, "not a regular file"),
        (_directory, "Is a directory"),
        (_too_large, "larger than 512 MB"),
        (lambda path: path.chmod(0o620), "it can be written by other users"),
        (lambda path: path.chmod(0o602), "it can be written by other users"),
        (lambda path: path.parent.chmod(0o777), "references can be written by other users"),
        (lambda path: path.parent.parent.chmod(0o777), "cache can be written by other users"),
    ],
    ids=["symlink", "pipe", "directory", "too large", "group file", "world file", "world folder", "world cache"],
)
def test_what_others_could_have_written_is_not_read(
    model: Any, path: Path, tamper: Callable[[Path], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    tamper(path)
    assert says in refused(model, caplog)


# --- on disk ---


def test_nobody_else_can_read_or_write(path: Path, cache: Path) -> None:
    assert path.parent == cache / "references"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.fault("A29")
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    model: Any, said: Answers, path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        References(IDENTITY).save(knowing(model, said))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_without_a_folder_that_lasts_nothing_is_kept(
    model: Any, said: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "file" / "cache"))  # cannot be made, whoever one is
    monkeypatch.setattr(cache_dir, "write", lambda *_: pytest.fail("it was written"))
    kept, exam = References(IDENTITY), knowing(model, said)
    kept.save(exam)
    assert kept.path(exam) is None
    assert not kept.restore(blank(model))


def files(folder: Path, ages: dict[str, int]) -> Path:
    """Files of 100 bytes; the name says when each was used."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, used in ages.items():
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (used, used))
    return folder


@pytest.mark.parametrize(
    ("coming", "left"),
    [(0, "abcd"), (100, "abcd"), (101, "acd"), (200, "acd"), (201, "ad"), (400, "d"), (401, ""), (10**9, "")],
)
def test_the_least_recently_used_go_first(tmp_path: Path, coming: int, left: str) -> None:
    folder = files(tmp_path / "references", {"a": 3, "b": 1, "c": 2, "d": 4})
    tensor_file._make_room(folder, coming, 500)
    assert "".join(sorted(p.name for p in folder.iterdir())) == left


def test_what_is_being_written_stays_and_what_killed_processes_left_goes(tmp_path: Path) -> None:
    folder = files(tmp_path / "references", {".old-draft": 1, "a": 2, "b": 3})
    (folder / ".draft").write_bytes(bytes(100))
    (folder / "folder").mkdir()
    tensor_file._make_room(folder, 50, 250)
    assert sorted(p.name for p in folder.iterdir()) == [".draft", "folder"]


def test_reading_counts_as_use_and_saving_makes_room(
    model: Any, said: Answers, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = path.stat().st_size
    monkeypatch.setattr(references, "MOST_BYTES", int(2.5 * size))
    monkeypatch.setattr(references, "SHARE", 1.0)
    os.utime(path, (1, 1))
    (path.parent / "between").write_bytes(bytes(size))
    os.utime(path.parent / "between", (2, 2))
    assert References(IDENTITY).restore(blank(model))
    other = References(replace(IDENTITY, model="another"))
    other.save(knowing(model, said))
    assert set(path.parent.iterdir()) == {path, other.path(blank(model))}


@pytest.mark.parametrize(("most", "kept"), [(2.001, True), (1.999, False)])
def test_an_exam_larger_than_half_of_the_room_is_not_kept(
    model: Any, said: Answers, path: Path, most: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "MOST_BYTES", int(most * path.stat().st_size))
    path.unlink()
    References(IDENTITY).save(knowing(model, said))
    assert path.exists() == kept


WRITER = """
import sys, torch
from types import SimpleNamespace
from autotune.tune.plan import Fingerprint
from autotune.tune.references import References
from autotune.validate.answers import Answers
from autotune.validate.tiers import SIZES

def exam(value):
    logits = {str(k): torch.full((8, 24, 256), value).half() for k in range(8)}
    answers = Answers(((int(value),),), None, logits)
    return SimpleNamespace(size=SIZES["quick"], prompts=(), pad_token_id=0, eos_token_ids=(), seed=0, original=None,
                           answers=lambda: answers, take=print)

if __name__ == "__main__":
    for k in range(100):
        References(Fingerprint("m", "h", {}, "", "", "")).save(exam(float(k % 2)))
"""


@pytest.mark.fault("F76")
@pytest.mark.slow
def test_processes_that_write_at_once_never_leave_half_a_file(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "autotune")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER]) for _ in range(2)]
    kept, space = References(Fingerprint("m", "h", {}, "", "", "")), dict[str, Any]()
    exec(WRITER, space)  # its function
    exam, seen = space["exam"](0.0), list[Answers]()
    exam.take = seen.append
    while any(writer.poll() is None for writer in writers):
        kept.restore(exam)
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert kept.restore(exam)
    assert all({int(t.unique()) for t in found.logits.values()} == {found.own[0][0]} for found in seen)
    assert not [r for r in caplog.records if r.name == "autotune"]
    assert list((cache / "references").iterdir()) == [kept.path(exam)]


# --- tuning ---


@pytest.mark.parametrize(
    ("options", "under", "change", "kept"),
    [
        ({}, None, False, 2),
        ({"cache": False}, None, False, 0),
        ({}, torch.autocast("cpu", torch.bfloat16), False, 0),
        ({}, None, True, 0),
    ],
    ids=["as usual", "no cache", "autocast", "the weights changed meanwhile"],
)
def test_tuning_keeps_what_the_original_said(
    options: dict[str, Any],
    under: Any,
    change: bool,
    kept: int,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, benches = tiny("llama"), list[Any]()

    def search(original: Variant, policy: Any, hardware: Any, bench: Any, **_: Any) -> Any:
        benches.append(bench)
        for exam in (bench.exams.to_choose, bench.exams.to_confirm):
            exam.reference(exam.texts[:1])
        if change:
            with torch.no_grad():
                model.lm_head.weight += 1
        return type("Found", (), {"trials": ()})

    def conclude(found: Any, bench: Any, identity: Any, start: float, meter: Any) -> Any:
        return Tuned(bench.original, plans.Plan(identity, ()), None, "kept the original", "for a test")

    monkeypatch.setattr(tuning, "search", search)
    monkeypatch.setattr(tuning, "conclude", conclude)
    work = Workload(tuple(map(tuple, token_prompts(40, length=40))))

    def tuned(name: str) -> None:
        if under is None:
            tuning.tune(model, work, policy.load(name), **options)
        else:
            with under:
                tuning.tune(model, work, policy.load(name), **options)

    if change:
        with pytest.raises(AutotuneError, match="weights changed"):
            tuned("balanced")
    else:
        tuned("balanced")
    assert len(list((cache / "references").glob("*"))) == kept
    if not kept:
        return
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *given: calls.append(1))
    tuned("memory")
    assert [exam._taken > 0 for exam in (benches[1].exams.to_choose, benches[1].exams.to_confirm)] == [True, True]
    assert not calls
