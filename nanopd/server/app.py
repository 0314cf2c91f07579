"""The routes."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from nanopd.client import PromptReader
from nanopd.cluster import Cluster
from nanopd.core import InvalidRequest, SamplingParams
from nanopd.server.answering import Answer, ServerLimits, Service
from nanopd.server.driver import Driver
from nanopd.server.errors import ApiError, failed, invalid, to_json
from nanopd.server.forms import ChatForm, CompletionForm, Form
from nanopd.server.gate import Gate, visit_of
from nanopd.server.job import Job, ReadPrompt
from nanopd.server.prometheus import Metrics
from nanopd.server.protocol import Ask, ChatAsk, CompletionAsk

STATUS_WAIT = 2.0  # seconds that /metrics waits for the workers
DRAINED = 4  # times the largest body: so much of a larger one is read, so that the client hears why it is refused


@dataclass(frozen=True)
class Served:
    """What is served, and under which name."""

    name: str
    max_model_len: int
    tokenizer: Any | None


class Api:
    """The endpoints. One for each server."""

    def __init__(self, served: Served, service: Service) -> None:
        self.served = served
        self.service = service
        self.reader = PromptReader(served.tokenizer)
        self.created = int(time.time())

    async def completions(self, request: Request) -> Response:
        ask = await self._ask(request, CompletionAsk)
        sampling, given = ask.sampling(), ask.prompts()
        prompts = await asyncio.to_thread(lambda: [self.reader.read(prompt) for prompt in given])
        echo = await asyncio.to_thread(lambda: [self._text(prompt) for prompt in prompts]) if ask.echo else None
        form = CompletionForm(self.served.name, self.served.tokenizer, sampling.n, sampling.logprobs, echo)
        return self._answer(ask, sampling, prompts, form)

    async def chat(self, request: Request) -> Response:
        ask = await self._ask(request, ChatAsk)
        sampling, conversation = ask.sampling(), ask.conversation()
        prompt = await asyncio.to_thread(self.reader.read_chat, conversation)
        form = ChatForm(self.served.name, self.served.tokenizer, sampling.n, sampling.logprobs)
        return self._answer(ask, sampling, [prompt], form)

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return _json(self._model())

    async def health(self) -> Response:
        error = self.service.error
        return _json({"status": "ok"} if error is None else {"status": "unavailable", "reason": error}, 200 if error is None else 503)

    async def metrics(self) -> Response:
        try:
            workers = await asyncio.wait_for(asyncio.wrap_future(self.service.driver.call(Cluster.status)), STATUS_WAIT)
        except (RuntimeError, asyncio.TimeoutError):  # the cluster has failed, or is busy: the rest can be told
            workers = {}
        return Response(self.service.metrics.render(workers), media_type=CONTENT_TYPE_LATEST)

    async def _ask(self, request: Request, kind: type[Ask]) -> Any:
        """What the client wants. Raises ApiError."""
        ask = kind.parse(_parse(await self._body(request)))
        self._check_model(ask.model)
        return ask

    def _answer(self, ask: Ask, sampling: SamplingParams, prompts: list[ReadPrompt], form: Form) -> Answer:
        job = Job(prompts, sampling, streams=bool(ask.stream), timeout=self.service.limits.timeout)
        return Answer(self.service, job, form, ask.include_usage)

    async def _body(self, request: Request) -> bytes:
        """Raises ApiError for one that is too large, takes too long, or is said to be something else than JSON."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise ApiError(415, f"the content type must be application/json, not {content_type!r:.80}")
        limits = self.service.limits
        try:
            return await asyncio.wait_for(_read(request, limits.max_body), limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request had not arrived after {limits.body_seconds:g} s") from None
        except ClientDisconnect:
            visit_of(request.scope).outcome = "cancelled"
            raise invalid("the client left before its request had arrived") from None

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.served.name):
            raise ApiError(404, f"there is no model {name!r:.200}; served is {self.served.name!r}", param="model",
                           code="model_not_found")

    def _model(self) -> dict[str, Any]:
        return {"id": self.served.name, "object": "model", "created": self.created, "owned_by": "nanopd",
                "max_model_len": self.served.max_model_len}

    def _text(self, prompt: ReadPrompt) -> str:
        text, token_ids = prompt
        if text is not None:
            return text
        if self.served.tokenizer is None:
            raise invalid("echo needs a tokenizer, and this model has none", "echo")
        return self.served.tokenizer.decode(token_ids)


def make_app(served: Served, driver: Driver, limits: ServerLimits | None = None, api_key: str | None = None) -> FastAPI:
    """The application of a driver that has been started. `app.state.service` is its Service.

    Args:
        api_key: /v1 is for those who know it. None: for all.
    """
    limits = limits or ServerLimits()
    metrics = Metrics(driver)
    api = Api(served, Service(driver, metrics, limits))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        driver.attach(asyncio.get_running_loop())
        yield

    app = FastAPI(title="nanoPD", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = api.service
    app.add_middleware(Gate, metrics=metrics, most=limits.max_requests)
    router = APIRouter(prefix="/v1", dependencies=[Depends(_key_check(api_key))] if api_key else [])
    router.add_api_route("/completions", api.completions, methods=["POST"])
    router.add_api_route("/chat/completions", api.chat, methods=["POST"])
    router.add_api_route("/models", api.models, methods=["GET"])
    router.add_api_route("/models/{name:path}", api.model, methods=["GET"])
    app.include_router(router)
    app.add_api_route("/health", api.health, methods=["GET"])
    app.add_api_route("/metrics", api.metrics, methods=["GET"])
    app.add_exception_handler(ApiError, _say)
    app.add_exception_handler(InvalidRequest, lambda request, error: _say(request, invalid(str(error))))
    app.add_exception_handler(HTTPException, lambda request, error: _say(request, _http_error(request, error)))
    app.add_exception_handler(Exception, lambda request, error: _say(request, failed(f"{type(error).__name__}: {error}")))
    return app


def _say(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> ApiError:
    """A path or method that is not there."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path:.200}", headers=dict(error.headers or {}))


def _key_check(api_key: str) -> Callable[[Request], None]:
    expected = f"Bearer {api_key}".encode()

    def check(request: Request) -> None:
        if not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
            raise ApiError(401, "no or wrong API key: send the header 'Authorization: Bearer KEY'", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})

    return check


async def _read(request: Request, most: int) -> bytes:
    """The body. Raises ApiError where it is longer than `most` bytes; no more than those are ever held."""
    too_large = ApiError(413, f"the request is larger than {most:,} bytes", code="request_too_large")
    if int(request.headers.get("content-length", 0)) > DRAINED * most:
        raise too_large
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= most:
            body += piece
        elif size > DRAINED * most:
            raise too_large
    if size > most:
        raise too_large
    return bytes(body)


def _parse(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8; nested without end
        raise invalid(f"the body is not valid JSON: {error}") from None


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
