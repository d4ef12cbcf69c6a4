"""Serve a tuned model over HTTP, streaming tokens as they come.

pip install fastapi uvicorn
python examples/serving.py                     # tuned before the first request is accepted
python examples/serving.py --when background   # serves at once, tunes between the first requests
curl -N localhost:8000/generate -H 'content-type: application/json' -d '{"prompt": "Once upon a time"}'
curl localhost:8000/status
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import autotune

OPENINGS = (
    "Once upon a time",
    "The recipe needs",
    "In 1969",
    "Dear Sir,",
    "def add(a, b):",
    "The patient",
    "Our team",
    "He said",
)
PROMPTS = [f"{opening} {rest}" for opening in OPENINGS for rest in ("there", "is", "the", "and then")]


class Request(BaseModel):
    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(default=64, ge=1, le=512)


class Gone(StoppingCriteria):
    """Stops generating for a client that hung up."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def create_app(model: Any, tokenizer: Any, *, when: str = "blocking", policy: str = "balanced") -> FastAPI:
    """The application; the model is tuned when it starts ("blocking") or from its first requests on ("background")."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        workload = PROMPTS if when == "blocking" else None
        autotune.wrap(model, tokenizer=tokenizer, policy=policy, workload=workload, when=when)
        yield
        model.autotune.unwrap()

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    def generate(request: Request) -> StreamingResponse:
        return StreamingResponse(stream(model, tokenizer, request), media_type="text/plain")

    @app.get("/status")
    def status() -> dict[str, Any]:
        return dataclasses.asdict(model.autotune.status)

    return app


def stream(model: Any, tokenizer: Any, request: Request) -> Iterator[str]:
    """Pieces of the answer. The model generates in a thread of its own; starlette iterates over this in another."""
    inputs = tokenizer(request.prompt, return_tensors="pt").to(model.device)
    streamer, gone = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), Gone()

    def work() -> None:
        try:
            model.generate(
                **inputs,
                max_new_tokens=request.max_new_tokens,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([gone]),
            )
        finally:
            streamer.end()  # a failure must not leave the client waiting

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield from streamer
    finally:
        gone.event.set()
        thread.join()


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or hub name")
    parser.add_argument("--policy", default="balanced", help="name of a policy or a .toml file")
    parser.add_argument("--when", choices=["blocking", "background"], default="blocking")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    uvicorn.run(create_app(model, tokenizer, when=options.when, policy=options.policy), port=options.port)


if __name__ == "__main__":
    main()
