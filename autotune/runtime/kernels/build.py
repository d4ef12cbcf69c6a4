"""Compile the operators once per machine, keep the library in the cache, and load it.

A library's file name holds a key (sources, flags, compiler, torch, CPU) and a digest of its content. So a stale or
truncated file is never loaded, and processes that build at the same time do not disturb each other.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from autotune.errors import AutotuneError
from autotune.machine import cache_dir, compilers, ending, processor

log = logging.getLogger("autotune")

HERE = Path(__file__).parent
SOURCES = (  # the file that takes longest to compile comes first
    "program.cpp",
    "attention.cpp",
    "linear.cpp",
    "attend_many.cpp",
    "fused.cpp",
    "integer.cpp",
    "embedding.cpp",
    "matmul.cpp",
    "layers.cpp",
    "scratch.cpp",
)
HEADERS = (
    "vectors.h",
    "tensors.h",
    "scratch.h",
    "linear.h",
    "rounded.h",
    "vnni.h",
    "avx2.h",
    "integer.h",
    "attention.h",
    "elementwise.h",
    "embedding.h",
    "instructions.h",
    "team.h",
    "gang.h",
    "blocks.h",
    "bf16.h",
    "singles.h",
    "matmul.h",
    "token_rows.h",
    "gates.h",
    "layer.h",
    "attend_many.h",
    "curves.h",
)
TIMEOUT_S = 300.0
STABLE_ABI = "0x020a000000000000"  # torch 2.10, the first whose stable interface has parallel_for


_registered = set[str]()  # keys of the libraries that this process has loaded


class BuildError(AutotuneError):
    """The operators could not be built or loaded; the message is one sentence for the user."""


def load() -> Path:
    """Load the operators into torch, building them if the cache has none for this machine.

    Returns:
        The path of the loaded library.

    Raises:
        BuildError: there is no compiler, compilation failed or timed out, or the library does not load.
    """
    compiler, cache = find_compiler(), cache_dir.cache("kernels")
    if cache is None:
        raise BuildError("there is no directory to keep the compiled operators in; set AUTOTUNE_CACHE_DIR")
    key = build_key(compiler)
    for library in sorted(cache.glob(f"{key}-*.so")):
        if (damage := _damage(library)) is None:
            return _register(library)  # another of the same content would load no better
        log.warning("%s is not used: %s; building it again", library, damage)
        _remove(library)
    return _register(compile_library(compiler, key, cache))


def find_compiler() -> list[str]:
    """Find the command of the C++ compiler.

    Raises:
        BuildError: there is no compiler, or this platform's compilers are not supported.
    """
    if os.name == "nt":
        raise BuildError("the C++ operators are built on Linux and macOS only")
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as reason:
        raise BuildError(f"no C++ compiler: CXX is {os.environ['CXX']}, which is no command ({reason})") from reason
    if (command := compilers.command()) is None:
        wanted = named[0] if named else f"{', '.join(compilers.NAMES[:-1])} or {compilers.NAMES[-1]}"
        raise BuildError(f"no C++ compiler: {wanted} is not on PATH; install one (such as g++) or set CXX")
    return command


def flags() -> list[str]:
    """Compiler flags for this CPU, or for the instruction set that $AUTOTUNE_KERNEL_MARCH names."""
    package = Path(torch.__file__).parent
    march = os.environ.get("AUTOTUNE_KERNEL_MARCH", "native")
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return [
        *("-O3", f"-march={march}" if x86 else f"-mcpu={march}", "-std=c++17", "-fPIC"),
        *(f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f"-I{package / 'include'}"),
    ]


def libraries() -> list[str]:
    """Linker flags. No OpenMP library is linked: libtorch_cpu has its own threads, and two pools would compete."""
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


def build_key(compiler: list[str]) -> str:
    """Hash everything that a library depends on: sources, compiler and its version, flags, torch and CPU."""
    parts = [(HERE / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    texts = [*compiler, *flags(), *libraries(), _version(compiler), torch.__version__, processor.instruction_sets()]
    parts += [text.encode() for text in texts]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def compile_library(compiler: list[str], key: str, cache: Path) -> Path:
    """Compile into the directory `cache`.

    Raises:
        BuildError: the compiler failed or took too long, or the directory cannot be written.
    """
    try:
        cache_dir.sweep(each for each in cache.iterdir() if each.is_dir())
        scratch = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=cache))
    except OSError as reason:
        raise BuildError(f"the operators could not be compiled: {reason}") from reason
    target = scratch / "kernels.so"
    objects = {name: str(scratch / f"{name}.o") for name in SOURCES}
    steps = [[*compiler, "-c", str(HERE / name), *flags(), "-o", made] for name, made in objects.items()]
    link = [*compiler, "-shared", *objects.values(), *libraries(), "-o", str(target)]
    log.info("compiling the CPU operators (about half a minute, once): %s", shlex.join(link))
    name = shlex.join(compiler)

    def run(command: list[str]) -> None:
        done = ending.compile_with(command, TIMEOUT_S)
        if done.returncode:
            raise BuildError(f"{name} could not compile the operators: {_gist(done.stderr or done.stdout)}")

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for made in [pool.submit(run, command) for command in steps]:
                made.result()
        run(link)
        library = cache / f"{key}-{_digest(target)}.so"
        target.chmod(0o700)  # independent of the umask
        os.replace(target, library)
        return library
    except subprocess.TimeoutExpired:
        raise BuildError(f"{name} did not compile the operators within {TIMEOUT_S:.0f} s") from None
    except (OSError, RuntimeError) as reason:  # RuntimeError: no thread can be started
        raise BuildError(f"the operators could not be compiled: {reason}") from reason
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _register(library: Path) -> Path:
    """Load a library unless this process has loaded such a one, from another folder: who registers twice aborts."""
    key = library.name.rpartition("-")[0]
    if key in _registered:
        return library
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as reason:
        raise BuildError(f"the compiled operators do not load: {_gist(str(reason))}") from reason
    _registered.add(key)
    return library


def _remove(library: Path) -> None:
    try:
        library.unlink(missing_ok=True)
    except OSError as reason:  # for example a directory of that name; it is never loaded
        log.debug("%s stays: %s", library, reason)


def _damage(library: Path) -> str | None:
    """Why a library in the cache must not be loaded, or None."""
    try:
        cache_dir.require_own(library)
        is_intact = library.stem.endswith(f"-{_digest(library)}")
    except OSError as reason:
        return str(reason)
    return None if is_intact else "its content is not what its name says"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:24]


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            [*compiler, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},  # the same text in every language, as it is part of the library's key
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise BuildError(f"the C++ compiler {shlex.join(compiler)} does not run: {reason}") from reason
    return done.stdout


def _gist(output: str) -> str:
    """Join the lines of a compiler's output that say what is wrong into one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return " | ".join((errors or lines)[-3:]) or "it said nothing"
