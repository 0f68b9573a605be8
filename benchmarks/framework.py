"""The proxy that a web framework and a client library make, for comparison: framework.py PORT NODE_PORT.

It does nothing but pass a request on: no key, no limit, no record.
"""

from __future__ import annotations

import sys

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()
client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{sys.argv[2]}", limits=httpx.Limits(max_connections=None))


@app.post("/api/chat")
async def chat(request: Request) -> Response:
    """Pass it on."""
    answer = await client.post("/api/chat", content=await request.body())
    return Response(answer.content, media_type="application/json")


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), loop="uvloop", http="httptools", log_level="warning")
