"""The gateway as a middleware: `FLUIDMCP_CONFIG=vllm-config.json uvicorn starlette_middleware:app`.

`/{model}/…` goes to the models, everything else to the app; the models live in the app's lifespan.
"""

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fluidmcp_proxy import GatewayMiddleware, load_config


async def home(request: Request) -> PlainTextResponse:
    return PlainTextResponse("The models are at /MODEL/v1/…")


config = load_config(os.environ.get("FLUIDMCP_CONFIG", "vllm-config.json"))
app = Starlette(routes=[Route("/", home)], middleware=[Middleware(GatewayMiddleware, config=config)])
