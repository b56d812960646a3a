"""Models inside a FastAPI app with its own routes and lifespan: `uvicorn fastapi_app:app`.

The file is `FLUIDMCP_CONFIG`'s, else `vllm-config.json`. The models' API is below `/llm`; `/summary` is the app's own
and uses a model through the gateway's connections.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel

from fluidmcp_proxy import Gateway, load_config

gateway = Gateway(load_config(os.environ.get("FLUIDMCP_CONFIG", "vllm-config.json")))
MODEL = next(iter(gateway.config.models))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # Whatever else the app needs (a database, a cache) is opened here, too.
    async with gateway.run():
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/llm", gateway)


class Text(BaseModel):
    text: str


@app.post("/summary")
async def summary(text: Text) -> dict[str, str]:
    """Waits while the model loads, as a request from outside does."""
    client = gateway.client(MODEL)
    name = (await client.get("/models")).json()["data"][0]["id"]
    answer = await client.post(
        "/chat/completions",
        json={
            "model": name,
            "messages": [{"role": "user", "content": f"Summarise in one sentence: {text.text}"}],
            "max_tokens": 60,
        },
    )
    answer.raise_for_status()
    return {"summary": answer.json()["choices"][0]["message"]["content"]}
