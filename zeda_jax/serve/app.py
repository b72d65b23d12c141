"""The HTTP endpoints."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from zeda_jax.serve import metrics, responses
from zeda_jax.serve.errors import ApiError
from zeda_jax.serve.gate import Gate, error_response
from zeda_jax.serve.jobs import Job
from zeda_jax.serve.protocol import Body, ChatBody, CompletionBody, parse
from zeda_jax.serve.service import Service

_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_CLIENT_LEFT = 499  # nginx's number for it; nobody reads it but the metrics


def make_app(
  service: Service, numbers: metrics.Metrics, api_key: str | None = None, max_body_bytes: int = 4 * 2**20
) -> Gate:
  """The ASGI application.

  Args:
    service: whose worker has been started.
    numbers: what /metrics shows.
    api_key, max_body_bytes: see `Gate`.
  """
  app = fastapi.FastAPI(title="zeda serve", docs_url=None, redoc_url=None, openapi_url=None)
  gate = Gate(app, api_key, max_body_bytes)
  app.add_exception_handler(ApiError, _on_api_error)
  app.add_exception_handler(HTTPException, _on_http_exception)
  app.add_exception_handler(Exception, _on_exception)
  _add_information(app, gate, service, numbers)
  endpoint = _Endpoint(service, numbers)

  @app.post("/v1/completions")
  async def completions(request: Request) -> Response:
    def format(body: CompletionBody, prompts: list[list[int]]) -> responses.Format:
      echoed = service.echoed(body) if body.echo else [""] * len(prompts)
      return responses.CompletionFormat(body, prompts, echoed, service.vocabulary)

    return await endpoint.answer(request, CompletionBody, format)

  @app.post("/v1/chat/completions")
  async def chat_completions(request: Request) -> Response:
    def format(body: ChatBody, prompts: list[list[int]]) -> responses.Format:
      return responses.ChatFormat(body, prompts[0], service.vocabulary)

    return await endpoint.answer(request, ChatBody, format)

  return gate


def _add_information(app: fastapi.FastAPI, gate: Gate, service: Service, numbers: metrics.Metrics) -> None:
  @app.get("/health")
  async def health() -> Response:
    if service.worker.failure is not None:
      return PlainTextResponse(service.worker.failure, 503)
    return PlainTextResponse("draining", 503) if gate.is_draining else PlainTextResponse("ok")

  @app.get("/metrics")
  async def metrics_page() -> Response:
    return Response(numbers.page(), headers={"Content-Type": metrics.CONTENT_TYPE})

  model = service.model
  entry = {
    "id": model.name,
    "object": "model",
    "created": service.created,
    "owned_by": "zeda-jax",
    "max_model_len": model.longest,
  }

  @app.get("/v1/models")
  async def models() -> Response:
    return JSONResponse({"object": "list", "data": [entry]})

  @app.get("/v1/models/{name:path}")
  async def one_model(name: str) -> Response:
    service.check_model(name)
    return JSONResponse(entry)


class _Endpoint:
  def __init__(self, service: Service, numbers: metrics.Metrics):
    self._service, self._metrics = service, numbers

  async def answer(
    self, request: Request, kind: type[Body], make_format: Callable[[Any, list[list[int]]], responses.Format]
  ) -> Response:
    """The answer to a request, whole or as a stream; counted and timed."""
    watch, path = metrics.Stopwatch(), request.url.path

    def done(status: int) -> None:
      self._metrics.requests.labels(path, str(status)).inc()
      self._metrics.seconds.labels(path).observe(watch.seconds())
      if status == _CLIENT_LEFT:
        self._metrics.disconnects.inc()

    try:
      body = parse(kind, await request.body())
      job = await self._service.start(body)
    except ClientDisconnect:
      done(_CLIENT_LEFT)
      return Response(status_code=_CLIENT_LEFT)
    except ApiError as error:
      done(error.status)
      raise
    try:
      format = make_format(body, [prompt.tokens for prompt in job.prompts])
      if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        parts = responses.parts(job, format, with_usage)
        first = await _while_connected(request, job, anext(parts))  # an error is still an HTTP status here
        self._metrics.first_token.observe(watch.seconds())
        return _Stream(first, parts, lambda: self._service.worker.cancel(job), done)
      whole = await _while_connected(request, job, responses.whole_body(job, format))
      done(200)
      return JSONResponse(whole)
    except ClientDisconnect:
      self._service.worker.cancel(job)
      done(_CLIENT_LEFT)
      return Response(status_code=_CLIENT_LEFT)
    except BaseException as error:
      self._service.worker.cancel(job)
      done(error.status if isinstance(error, ApiError) else 500)
      raise


async def _while_connected(request: Request, job: Job, work: Any) -> Any:
  """The result of `work`, unless the client leaves before.

  Raises:
    ClientDisconnect: it did.
  """
  working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_until_disconnect(request))
  try:
    await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    if working.done():
      return working.result()
    raise ClientDisconnect
  finally:
    working.cancel()
    leaving.cancel()
    await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_disconnect(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


class _Stream(StreamingResponse):
  """Server-sent events. Whatever ends them, `free` is called, and `done` with a status."""

  def __init__(self, first: Any, parts: AsyncIterator[Any], free: Callable[[], None], done: Callable[[int], None]):
    super().__init__(self._lines(first, parts), headers=_SSE_HEADERS, media_type="text/event-stream")
    self._free, self._done, self._status = free, done, _CLIENT_LEFT

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._free()
      self._done(self._status)

  async def _lines(self, first: Any, parts: AsyncIterator[Any]) -> AsyncIterator[str]:
    try:
      yield _line(first)
      async for part in parts:
        yield _line(part)
      self._status = 200
    except ApiError as error:
      self._status = error.status
      yield _line(error.body())
    yield "data: [DONE]\n\n"


def _line(part: Any) -> str:
  return f"data: {json.dumps(part, ensure_ascii=False, separators=(',', ':'))}\n\n"


# --- errors -----------------------------------------------------------------------------------------------------------


async def _on_api_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, ApiError)
  return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  message = f"{request.method} {request.url.path}: {error.detail}."
  return error_response(ApiError(error.status_code, message, code="unknown_url" if error.status_code == 404 else None))


async def _on_exception(request: Request, error: Exception) -> Response:
  return error_response(ApiError(500, f"The server made an error ({type(error).__name__})."))
