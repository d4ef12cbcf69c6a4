"""`serve`: a model over HTTP."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from ..errors import PackageError
from .arguments import threads

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

KEY = "AUTOTUNE_API_KEY"
MOST_PORT = 65535


def arguments(command: ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument("model", metavar="MODEL", help="a local directory, a GGUF file or a hub name")
    command.add_argument("--name", help="name that clients use; default: the model's own")
    command.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: only this machine")
    command.add_argument("--port", type=port, default=8000, help="default 8000")
    command.add_argument("--policy", default="throughput", metavar="P", help="name or .toml file; default throughput")
    command.add_argument("--untuned", action="store_true", help="serve the model as it is; nothing is tried")
    command.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"asked for on every route but /livez; may be repeated; default ${KEY}",
    )
    command.add_argument("--max-prompt", type=positive, metavar="N", help="most tokens of a prompt")
    command.add_argument("--deadline", type=positive, metavar="S", help="seconds after which an answer is given up")
    command.add_argument("--drain", type=positive, default=30, metavar="S", help="seconds for answers at the end: 30")
    command.add_argument("--threads", type=threads, metavar="N", help="CPU threads")


def serve(args: Namespace) -> int:
    """Serve until a signal says to end.

    Raises:
        PackageError: the extra `serve` is not installed.
    """
    try:
        from ..serve import run
    except ImportError as error:
        raise PackageError(f'serving needs more packages ({error}): pip install "autotune[serve]"') from error
    import logging

    import torch

    from ..tune.policy import load

    if args.threads:
        torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("autotune.serve").setLevel(logging.INFO)
    own = os.environ.get(KEY)
    settings = run.Settings(
        model=args.model,
        name=args.name,
        host=args.host,
        port=args.port,
        policy=None if args.untuned else load(args.policy),
        keys=args.api_key or ([own] if own else []),
        longest=args.max_prompt,
        deadline_s=args.deadline,
        drain_s=args.drain,
    )
    return run.serve(settings)


def port(text: str) -> int:
    """Parse a port."""
    if not text.isdecimal() or len(text) > len(str(MOST_PORT)) or int(text) > MOST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 (any free one) to {MOST_PORT}")
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or len(text) > 9 or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
