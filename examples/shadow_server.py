"""Try a candidate on live traffic without any caller noticing: a shadow experiment in an HTTP server.

pip install fastapi uvicorn
python examples/shadow_server.py --candidate path/to/another-checkpoint   # or a plan's .json, or a policy's name
curl localhost:8000/generate -H 'content-type: application/json' -d '{"prompt": "Once upon a time"}'
curl localhost:8000/experiment          # verdict, findings, what was dropped
autotune experiment status shadow       # the same from another terminal, and after a restart
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotune.compare.experiment import Experiment

PROMPTS = ["Once upon a time there was", "The recipe needs", "In 1969", "def add(a, b):"]  # sizes what is prepared


class Request(BaseModel):
    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(default=64, ge=1, le=512)


class Answer(BaseModel):
    text: str


def create_app(
    model: Any, tokenizer: Any, candidates: Mapping[str, Any], *, share: float = 0.05, store: Path | None = None
) -> FastAPI:
    """The application: `model` answers every request, a share of them is replayed on the candidates when it is idle."""
    experiment = Experiment(
        "shadow", control=model, candidates=candidates, tokenizer=tokenizer, workload=PROMPTS, store=store
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with experiment.shadow(model, share=share, queue=16, deadline_s=60, budget=0.1) as app.state.shadow:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    def generate(request: Request) -> Answer:
        inputs = tokenizer(request.prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=request.max_new_tokens)[0, inputs["input_ids"].shape[1] :]
        return Answer(text=tokenizer.decode(ids, skip_special_tokens=True))

    @app.get("/experiment")
    def status() -> dict[str, Any]:
        plain: dict[str, Any] = app.state.shadow.status.to_dict()
        return plain

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or hub name")
    parser.add_argument("--candidate", required=True, help="a checkpoint, a plan's .json file, or a policy's name")
    parser.add_argument("--share", type=float, default=0.05, help="of requests that are replayed")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    app = create_app(model, tokenizer, {"candidate": options.candidate}, share=options.share)
    uvicorn.run(app, port=options.port)


if __name__ == "__main__":
    main()
