"""What every request passes before it is read: is the server open, is the key right, is the body small enough."""

import hmac
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zeda_jax.serve.errors import ApiError


class BodyTooLarge(ApiError):
  def __init__(self, limit: int):
    super().__init__(413, f"The body has more than {limit} bytes: send less.", code="body_too_large")


class Gate:
  """ASGI middleware; it leaves `receive` able to say that the client has left.

  Args:
    app: what is behind it.
    api_key: that clients of /v1 must send as a bearer token; None lets all in.
    max_body_bytes: of a request.

  Attributes:
    is_draining: refuse what comes from now on.
    active: requests to /v1 that are being answered.
  """

  def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int):
    self._app, self._max_body_bytes = app, max_body_bytes
    self._key = None if api_key is None else api_key.encode()
    self.is_draining = False
    self.active = 0

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
      await self._app(scope, receive, send)
      return
    try:
      self._check(dict(scope["headers"]), scope["method"])
    except ApiError as error:
      await error_response(error)(scope, receive, send)
      return
    self.active += 1
    try:
      await self._app(scope, self._limited(receive), send)
    finally:
      self.active -= 1

  def _check(self, headers: dict[bytes, bytes], method: str) -> None:
    if self._key is not None:
      kind, _, key = headers.get(b"authorization", b"").partition(b" ")
      if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
        raise ApiError(
          401, "The API key is missing or wrong: send it as Authorization: Bearer KEY.", code="invalid_api_key"
        )
    if self.is_draining:
      raise ApiError(503, "The server is stopping: try again later.", code="draining")
    if method == "POST" and headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
      # What a web page may send to this machine unasked has another type.
      raise ApiError(415, "The Content-Type is not application/json.", code="unsupported_media_type")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > self._max_body_bytes:
      raise BodyTooLarge(self._max_body_bytes)

  def _limited(self, receive: Receive) -> Receive:
    count = 0

    async def limited() -> Message:
      nonlocal count
      message = await receive()
      count += len(message.get("body", b""))
      if count > self._max_body_bytes:
        raise BodyTooLarge(self._max_body_bytes)
      return message

    return limited


def error_response(error: ApiError) -> Any:
  return JSONResponse(error.body(), error.status, error.headers)
