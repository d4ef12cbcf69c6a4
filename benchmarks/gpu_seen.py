"""The GPU that torch sees, or why it sees none: `python -m benchmarks.gpu_seen`."""

from __future__ import annotations

import sys

import torch


def obstacle() -> str | None:
    """Why torch sees no GPU and what to do, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install the CUDA build of this release"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU: does nvidia-smi list one? Does CUDA_VISIBLE_DEVICES hide it?"
    return None


def main() -> int:
    if reason := obstacle():
        print(reason, file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
