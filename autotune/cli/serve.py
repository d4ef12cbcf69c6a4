"""`serve` and `bench-serve`: a model over HTTP, and a load on it."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MeasurementError, PackageError, SettingsError
from ..runtime.batching.terms import MOST_WAITING
from ..serve import logs
from ..serve.keys import VARIABLE as KEY
from ..serve.keys import given
from .arguments import number, plan_of, threads, whole

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Mapping

    from ..serve.run import Settings

POLICY = "throughput"
DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_PORT = 65535
MOST = 10**9 - 1  # far beyond any sense


def arguments(command: ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument("model", metavar="MODEL", help="a local directory, a GGUF file or a hub name")
    command.add_argument(
        "--name",
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name that clients use; further ones are aliases; default: the model's own",
    )
    command.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: only this machine")
    command.add_argument("--port", type=port, default=8000, help="default 8000")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; default auto: as stored")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model; default main")
    command.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template; default the model's own")
    command.add_argument("--policy", metavar="P", help=f"name or .toml file; default {POLICY}")
    command.add_argument("--plan", type=Path, metavar="FILE", help="a plan.json: verified, then served")
    tuned = command.add_mutually_exclusive_group()
    tuned.add_argument("--tune", action="store_true", help="tune beside the requests: the default, said explicitly")
    tuned.add_argument("--untuned", action="store_true", help="serve the model as it is; nothing is tried")
    command.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"asked for on every route but /livez and the bare page; may be repeated; default ${KEY}",
    )
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help="API keys, one a line")
    command.add_argument("--max-prompt", type=positive, metavar="N", help="most tokens of a prompt")
    command.add_argument("--queue", type=queue, metavar="N", help=f"most requests that wait; default {MOST_WAITING}")
    command.add_argument(
        "--max-body", type=positive, default=4 * 2**20, metavar="BYTES", help="of a request; default 4 MiB"
    )
    command.add_argument("--deadline", type=seconds, metavar="S", help="seconds after which an answer is given up")
    command.add_argument("--drain", type=positive, default=30, metavar="S", help="seconds for answers at the end: 30")
    command.add_argument(
        "--keep-alive", type=positive, default=75, metavar="S", help="seconds that a connection may be idle: 75"
    )
    command.add_argument(
        "--write-timeout",
        type=seconds,
        default=60.0,
        metavar="S",
        help="seconds after which a client that takes nothing of its answer is dropped: 60",
    )
    command.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="certificate (PEM): serve HTTPS")
    command.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its private key; default in the same file")
    command.add_argument("--log-level", choices=logs.LEVELS, default="info", help="default info: a line a request")
    command.add_argument("--threads", type=threads, metavar="N", help="CPU threads")


def serve(args: Namespace) -> int:
    """Serve until a signal says to end.

    Raises:
        PackageError: the extra `serve` is not installed.
        SettingsError: an option cannot be used.
    """
    try:
        from ..serve import run
    except ImportError as error:
        raise _missing(error) from error
    import torch

    settings = settings_of(args, os.environ)
    if args.threads:
        torch.set_num_threads(args.threads)
    undo = logs.install(settings.log_level)
    try:
        return run.serve(settings)
    finally:
        undo()


def settings_of(args: Namespace, environment: Mapping[str, str]) -> Settings:
    """Return how to serve.

    Raises:
        SettingsError: an option cannot be used, or not beside another.
        PlanError, PolicyError: the plan or the policy cannot be used.
    """
    import torch

    from ..serve.gate import HttpLimits
    from ..serve.run import Settings
    from ..tune.policy import load

    plan = plan_of(args.plan)
    _refuse(args, environment)
    name, *aliases = args.name or [None]
    return Settings(
        model=args.model,
        name=name,
        aliases=aliases,
        host=args.host,
        port=args.port,
        policy=None if args.untuned else load(args.policy or POLICY),
        plan=plan,
        keys=given(args.api_key or (), args.api_key_file, environment),
        longest=args.max_prompt,
        deadline_s=args.deadline,
        drain_s=args.drain,
        most_waiting=args.queue,
        limits=HttpLimits(body_bytes=args.max_body, write_s=args.write_timeout),
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        revision=args.revision,
        template=_text(args.chat_template) if args.chat_template else None,
        tls=(args.ssl_certfile, args.ssl_keyfile) if args.ssl_certfile else None,
        keep_alive_s=args.keep_alive,
        log_level=args.log_level,
    )


def _refuse(args: Namespace, environment: Mapping[str, str]) -> None:
    """Raise SettingsError where options contradict each other or the environment."""
    ranks = environment.get("WORLD_SIZE", "1")
    if args.untuned and args.plan:
        raise SettingsError("--plan and --untuned exclude each other: a plan is verified, which tries something")
    if args.untuned and args.policy:
        raise SettingsError("--policy and --untuned exclude each other: a policy says what is tried")
    if args.ssl_keyfile and not args.ssl_certfile:
        raise SettingsError("--ssl-keyfile needs --ssl-certfile")
    if ranks.isdecimal() and int(ranks) > 1:
        raise SettingsError(
            f"WORLD_SIZE is {ranks}: a server is one process, and serves no model that is sharded over ranks; start it "
            "without torchrun"
        )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"--chat-template {file} cannot be read: {error}") from error


def bench_arguments(command: ArgumentParser) -> None:
    """Add the arguments of `bench-serve`."""
    command.add_argument("url", metavar="URL", help="the server: http://127.0.0.1:8000")
    command.add_argument("--clients", type=numbers, metavar="N,N", help="clients that ask one request after the other")
    command.add_argument("--each", type=positive, default=4, metavar="N", help="requests of each of them; default 4")
    command.add_argument("--rates", type=rates, metavar="R,R", help="requests a second at random times; default 1,2,4")
    command.add_argument("--seconds", type=positive, default=20, metavar="S", help="of each rate; default 20")
    command.add_argument("--words", type=positive, default=64, metavar="N", help="of a prompt; default 64")
    command.add_argument("--tokens", type=positive, default=32, metavar="N", help="of an answer; default 32")
    command.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="default 0: nothing is drawn"
    )
    command.add_argument("--top-p", type=top_p, default=1.0, metavar="P", help="share to draw from; default 1")
    command.add_argument("--api-key", metavar="KEY", help=f"default ${KEY}")


def bench(args: Namespace) -> int:
    """Put a load on a server and print how long its clients waited.

    Raises:
        MeasurementError: the server does not answer.
        PackageError: the extra `serve` is not installed.
    """
    try:
        import httpx

        from ..serve import load
    except ImportError as error:
        raise _missing(error) from error
    key = args.api_key or os.environ.get(KEY)
    url = args.url.rstrip("/").removesuffix("/v1")
    try:
        name = asyncio.run(load.model_of(url, key))
    except httpx.HTTPStatusError as error:
        raise MeasurementError(f"{url} refuses: {load.refusal(error.response)}") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise MeasurementError(f"{url} does not answer as a server of models does: {error}") from error
    asked = load.Load(url, name, args.words, args.tokens, key, args.temperature, args.top_p)
    rows = [asyncio.run(load.steady(asked, clients, args.each)) for clients in args.clients or ()]
    if args.rates or not args.clients:
        rows += [asyncio.run(load.arriving(asked, rate, args.seconds)) for rate in args.rates or (1.0, 2.0, 4.0)]
    drawn = f", drawn at temperature {args.temperature:g}, top-p {args.top_p:g}" if args.temperature else ""
    print(f"{name} at {url}: prompts of {args.words} words, answers of {args.tokens} tokens{drawn}\n")  # noqa: T201
    print(load.table(rows))  # noqa: T201
    return 0


def numbers(text: str) -> list[int]:
    """Parse whole numbers above 0, separated by commas."""
    return [positive(part) for part in text.split(",")]


def temperature(text: str) -> float:
    """Parse a temperature."""
    return number(text, lambda found: 0 <= found <= 2, "a temperature of 0 to 2")


def top_p(text: str) -> float:
    """Parse the probability of the tokens that are drawn from."""
    return number(text, lambda found: 0 < found <= 1, "a number above 0, and at most 1")


def rates(text: str) -> list[float]:
    """Parse numbers above 0, separated by commas."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < math.inf for rate in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 1,2,4")
    return found


def _missing(error: ImportError) -> PackageError:
    return PackageError(f'serving needs more packages ({error}): pip install "autotune-inference[serve]"')


def port(text: str) -> int:
    """Parse a port."""
    return whole(text, 0, MOST_PORT, f"a port: 0 (any free one) to {MOST_PORT}")


def queue(text: str) -> int:
    """Parse how many requests may wait."""
    return whole(text, 1, MOST_WAITING, f"a whole number of 1 to {MOST_WAITING}")


def seconds(text: str) -> float:
    """Parse a number of seconds above 0."""
    return number(text, lambda found: 0 < found < math.inf, "a number of seconds above 0, such as 30 or 0.5")


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    return whole(text, 1, MOST, "a whole number above 0")
