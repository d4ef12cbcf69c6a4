"""A cache folder is this user's alone, and so is every file in it that is run or loaded; or it is not used."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import autotune
from autotune.errors import TransformError
from autotune.machine import cache_dir
from autotune.model import gguf
from autotune.runtime.kernels import build
from autotune.runtime.steps import compiled

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "0" * 24
NAMES = ("kernels", "steps", "models", "plans", "checks", "experiments", "references", "packed", "programs", "rollouts")
PACKAGE = Path(autotune.__file__).parent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; nothing was warned of before."""
    root = tmp_path / "above" / "cache"
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(root))
    cache_dir.warn_once.cache_clear()
    cache_dir._temporary.cache_clear()
    return root


@pytest.fixture
def own(cache: Path) -> Path:
    """The folder of the compiled operators, as autotune makes it."""
    found = cache_dir.cache("kernels")
    assert found == cache / "kernels"
    return found


def writable(mode: int) -> Callable[[Path], None]:
    return lambda folder: folder.chmod(mode)


def linked(folder: Path) -> None:
    """To a folder that is as private."""
    elsewhere = folder.parent / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere, target_is_directory=True)


def dangling(folder: Path) -> None:
    linked(folder)
    shutil.rmtree(folder.resolve())


def someone_elses(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(folder, 12345, -1)


def exchangeable(folder: Path) -> None:
    folder.parent.chmod(0o777)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


HOSTILE = {
    "group": (writable(0o770), "can be written by other users"),
    "all": (writable(0o777), "can be written by other users"),
    "sticky": (writable(0o1777), "can be written by other users"),
    "link": (linked, "is a link"),
    "dangling link": (dangling, "exists"),
    "someone else's": (someone_elses, "belongs to user 12345"),
    "file": (a_file, "exists"),
}


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["the folder itself", "the cache"])
def test_a_folder_that_is_not_this_users_alone_is_not_used(
    cache: Path,
    name: str,
    which: str,
    change: Callable[[Path], None],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert cache_dir.cache(name) == cache / name
    change(cache / name if which == "the folder itself" else cache)
    for _ in range(2):
        found = cache_dir.cache(name)
        assert found is not None
        assert cache not in found.parents
        cache_dir.require_private(found)
    (warning,) = caplog.messages
    assert said in warning
    assert "set AUTOTUNE_CACHE_DIR" in warning


def test_nor_one_that_everybody_may_rename(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cache_dir.cache("plans") == cache / "plans"
    exchangeable(cache)
    found = cache_dir.cache("plans")
    assert found is not None
    assert cache not in found.parents
    assert f"can be exchanged by other users, who can write to {cache.parent}" in caplog.text


def test_a_private_folder_below_a_sticky_one_is_used(cache: Path) -> None:
    cache.parent.mkdir()
    cache.parent.chmod(0o1777)
    assert cache_dir.cache("plans") == cache / "plans"


def test_nothing_is_made_in_a_folder_that_is_someone_elses(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    cache_dir.cache("plans")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("value", ["~nobody-of-that-name/cache", "\udcff"])
def test_a_path_that_cannot_be_one_is_a_warning(
    cache: Path, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", value)
    monkeypatch.chdir(cache.parent.parent)
    assert cache_dir.cache("plans") is not None


def test_the_cache_is_found_in_one_place() -> None:
    """Who asks the environment, or builds the path, passes by the guard."""
    for file in PACKAGE.rglob("*.py"):
        if file.name == "cache_dir.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            assert text not in ("AUTOTUNE_CACHE_DIR", "XDG_CACHE_HOME", ".cache"), f"{file} names {text!r}"


def test_every_folder_is_in_the_table() -> None:
    asked = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "cache_dir.cache" and node.args:
                asked.add(ast.unparse(node.args[0]).strip("'"))
    assert asked - {"FOLDER"} <= set(NAMES)  # the plans' is a constant
    assert len(asked) == len(NAMES)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A library that leaves a trace when it is loaded, and the trace."""
    folder = tmp_path_factory.mktemp("planted")
    source, trace = folder / "planted.cpp", folder / "ran"
    source.write_text(f'#include <cstdio>\n__attribute__((constructor)) void run() {{ std::fopen("{trace}", "w"); }}\n')
    library = folder / "planted.so"
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library, trace


class BuiltError(Exception):
    """The kernels would have been built."""


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(*_: object) -> Path:
        raise BuiltError

    monkeypatch.setattr(build, "build_key", lambda compiler: KEY)
    monkeypatch.setattr(build, "compile_library", instead)


def plant(folder: Path, library: Path, name: str = "", *, link: bool = False) -> Path:
    """Under a name that the cache expects."""
    path = folder / f"{KEY}-{name or build._digest(library)}.so"
    if link:
        path.symlink_to(library)
    else:
        shutil.copyfile(library, path)
        path.chmod(0o700)
    return path


def test_the_cache_loads_what_it_kept(own: Path, planted: tuple[Path, Path], building: None) -> None:
    """Or the tests below would prove nothing."""
    library, trace = planted
    plant(own, library)
    build.load()
    assert trace.exists()
    trace.unlink()


@pytest.mark.fault("F75")
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o707])
@pytest.mark.parametrize("which", ["kernels", "cache"])
def test_nothing_is_loaded_from_a_folder_that_others_can_write(
    own: Path, planted: tuple[Path, Path], building: None, caplog: pytest.LogCaptureFixture, which: str, mode: int
) -> None:
    library, trace = planted
    plant(own, library)
    (own if which == "kernels" else own.parent).chmod(mode)
    for _ in range(2):
        with pytest.raises(BuiltError):
            build.load()
    assert not trace.exists()
    assert caplog.text.count("can be written by other users") == 1


@pytest.mark.parametrize("how", ["linked", "written by others", "another digest"])
def test_a_library_that_is_not_this_users_own_file_is_built_anew(
    own: Path, planted: tuple[Path, Path], building: None, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    library, trace = planted
    path = plant(own, library, "1" * 24 if how == "another digest" else "", link=how == "linked")
    if how == "written by others":
        path.chmod(0o770)
    with pytest.raises(BuiltError):
        build.load()
    assert not trace.exists()
    assert not path.is_symlink()
    assert not path.exists()
    assert library.exists()
    assert "building it again" in caplog.text


def test_a_directory_under_a_librarys_name_is_not_in_the_way(own: Path, building: None) -> None:
    (own / f"{KEY}-{'1' * 24}.so").mkdir()
    with pytest.raises(BuiltError):
        build.load()


@pytest.mark.parametrize("how", ["linked", "written by others"])
def test_a_compiled_step_that_is_not_this_users_own_file_is_not_read(
    own: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    step = own / "a.step"
    (own / "elsewhere").write_bytes(b"code")
    if how == "linked":
        step.symlink_to(own / "elsewhere")
    else:
        step.write_bytes(b"code")
        step.chmod(0o666)
    monkeypatch.setattr("torch.compiler.load_compiled_function", lambda *_, **__: pytest.fail("it was loaded"))
    assert compiled.load(step) is None
    assert "could not be loaded" in caplog.text
    assert compiled.load(own / "none.step") is None


def kept(folder: Path) -> Path:
    """A finished conversion."""
    folder.mkdir(mode=0o700)
    stem = folder / "tiny"
    stem.mkdir(mode=0o700)
    (stem / "config.json").write_text("{}")
    (stem / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    gguf._seal(stem)
    return stem


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def zeroed(weights: Path) -> None:
    """As a crash leaves pages that never reached the disk."""
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)


def moved(weights: Path) -> None:
    weights.rename(weights.parent.parent.parent / "elsewhere")
    weights.symlink_to(weights.parent.parent.parent / "elsewhere")


TORN: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "shorter": cut,
    "zeroed": zeroed,
    "linked": moved,
    "written by others": lambda weights: weights.chmod(0o666),
    "its folder written by others": lambda weights: weights.parent.chmod(0o777),
    "the folder above written by others": lambda weights: weights.parent.parent.chmod(0o777),
    "unfinished": lambda weights: (weights.parent.parent / gguf.WHOLE).unlink(),
    "a list that is none": lambda weights: (weights.parent.parent / gguf.WHOLE).write_text("[1]"),
    "a list of nothing": lambda weights: (weights.parent.parent / gguf.WHOLE).write_text("{}"),
    "a list of sizes alone": lambda weights: (weights.parent.parent / gguf.WHOLE).write_text('{"config.json": 2}'),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN.keys())
def test_a_torn_conversion_is_noticed(own: Path, tear: Callable[[Path], object]) -> None:
    stem = kept(own / "key")
    assert gguf._defect(own / "key") is None
    tear(stem / "model.safetensors")
    assert gguf._defect(own / "key")


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    old, young, folder = tmp_path / "old.tmp", tmp_path / "young.tmp", tmp_path / "folder"
    elsewhere = tmp_path / "kept"
    folder.mkdir()
    for file in (old, young, folder / "inside", elsewhere):
        file.touch()
    link = tmp_path / "link.tmp"
    link.symlink_to(elsewhere)
    for path in (old, folder, link):
        os.utime(path, (1, 1), follow_symlinks=False)
    cache_dir.sweep((old, young, folder, link, tmp_path / "gone"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "young.tmp"]


@pytest.mark.fault("F75")
@pytest.mark.parametrize(
    ("mode", "named", "trusted"),
    [(None, False, True), (0o755, False, True), (0o777, False, False), (0o777, True, True)],
    ids=["not there", "ours", "writable by others", "named by the user"],
)
def test_torchs_own_cache_is_not_believed_where_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None, named: bool, trusted: bool
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine" if named else default_cache_dir()))
    if mode is not None:
        folder = Path(default_cache_dir())
        folder.mkdir()
        folder.chmod(mode)
    if trusted:
        compiled.require_private_cache()
        assert Path(default_cache_dir()).stat().st_mode & 0o777 == (mode or 0o700)
    else:
        with pytest.raises(TransformError, match=r"can be written by other users.*set TORCHINDUCTOR_CACHE_DIR"):
            compiled.require_private_cache()
