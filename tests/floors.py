"""The package's folders as floors, and who imports whom; type hints and lazy imports count.

python -m tests.floors            # the floors, arrows between folders, circles of files
python -m tests.floors PATH       # of another checkout
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the ground up; folders on one floor do not know each other
    ("errors",),
    ("machine",),
    ("workload",),
    ("model", "report"),
    ("diagnose",),
    ("runtime",),
    ("profile", "transforms"),
    ("validate",),
    ("tune",),
    ("compare", "live"),
    ("serve",),
    ("cli",),
)
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
DOORS = ("autotune", "autotune.__main__")  # above every floor


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file, of the package."""
    found = {}
    for file in sorted((root / "autotune").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, file: Path, known: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of everything of the package that a file imports."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [full if (full := f"{source}.{alias.name}") in known else source for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name in known and name != module)


def arrows(root: Path = ROOT) -> dict[str, dict[str, int]]:
    """Module -> the modules that it imports, each with a line."""
    known = modules(root)
    return {module: {to: line for line, to in imports(module, file, known)} for module, file in known.items()}


def shared_names(root: Path = ROOT) -> dict[str, list[str]]:
    """Name -> modules, of the public classes that more than one module defines."""
    found: dict[str, list[str]] = {}
    for module, file in modules(root).items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    return {name: where for name, where in found.items() if len(where) > 1}


def folder(module: str) -> str:
    """The folder of a module, or the module at the top level."""
    return module.split(".")[1] if "." in module else module


def upward(found: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Imports that do not lead to a floor below, in words."""
    wrong = []
    for module, targets in found.items():
        if module in DOORS:
            continue
        here = folder(module)
        for to, line in targets.items():
            there = folder(to)
            if there != here and FLOOR.get(there, len(FLOORS)) >= FLOOR.get(here, -1):
                wrong.append(f"{module}, line {line}, imports {to}")
    return wrong


def circles(found: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Files that import each other, directly or by way of others; the largest first (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    rings: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for to in found[module]:
            if to not in number:
                visit(to)
            if to in stack:
                lowest[module] = min(lowest[module], lowest[to])
        if lowest[module] == number[module]:
            at = stack.index(module)
            rings.append(sorted(stack[at:]))
            del stack[at:]

    for module in found:
        if module not in number:
            visit(module)
    return sorted((ring for ring in rings if len(ring) > 1), key=len, reverse=True)


def main() -> None:
    root = Path(sys.argv[1]) if sys.argv[1:] else ROOT
    found = arrows(root)
    rooms = {(folder(module), folder(to)) for module, targets in found.items() for to in targets if module not in DOORS}
    between = {pair for pair in rooms if pair[0] != pair[1]}
    for number, folders in reversed(list(enumerate(FLOORS))):
        print(f"{number:3d}  {', '.join(folders)}")
    top = {folder(module) for module in found if module not in DOORS}
    print(f"{len(top)} folders and files at the top level, {len(found)} files, {len(between)} arrows between folders")
    rings = circles(found)
    print(f"{len(rings)} circles of files, the largest of {max(map(len, rings), default=0)}")
    print(f"{len(upward(found))} imports that do not lead to a floor below")


if __name__ == "__main__":
    main()
