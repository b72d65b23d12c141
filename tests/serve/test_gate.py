"""The key, the size and the kind of a body, and draining: in front of an application that answers everything."""

import asyncio
import contextlib

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from zeda_jax.serve.errors import ApiError
from zeda_jax.serve.gate import Gate, error_response

JSON = {"Content-Type": "application/json"}


async def echo(scope, receive, send):
  request = Request(scope, receive)
  try:
    response = PlainTextResponse(await request.body())
  except ApiError as error:
    response = error_response(error)
  await response(scope, receive, send)


def post(gate, content=b"{}", headers=JSON, path="/v1/completions", method="POST"):
  async def run():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://test") as client:
      return await client.request(method, path, content=content, headers=headers)

  return asyncio.run(run())


def message(response):
  assert set(response.json()) == {"error"}
  return response.json()["error"]["message"]


def test_key():
  gate = Gate(echo, "sesame", 100)
  for headers in (
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "sesame"},
    {"Authorization": "Basic sesame"},
  ):
    response = post(gate, headers=JSON | headers)
    assert response.status_code == 401 and "The API key is missing or wrong" in message(response)
    assert response.headers["WWW-Authenticate"] == "Bearer"
  assert post(gate, headers=JSON | {"Authorization": "Bearer sesame"}).text == "{}"
  assert post(gate, path="/v1/models", method="GET").status_code == 401
  assert post(gate, path="/health", method="GET").status_code == 200
  assert gate.active == 0


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_kind(kind):
  response = post(Gate(echo, None, 100), headers={"Content-Type": kind})
  assert response.status_code == 415 and "application/json" in message(response)
  assert post(Gate(echo, None, 100), headers={"Content-Type": "Application/JSON; charset=utf-8"}).text == "{}"


def test_size():
  gate = Gate(echo, None, 100)

  async def chunks(count):
    for _ in range(count):
      yield b"x" * 10

  assert post(gate, b"x" * 100).status_code == 200
  assert post(gate, chunks(10)).status_code == 200  # chunked: no Content-Length
  for content in (b"x" * 101, chunks(11)):
    response = post(gate, content)
    assert response.status_code == 413 and message(response) == "The body has more than 100 bytes: send less."


def test_draining():
  gate = Gate(echo, None, 100)
  gate.is_draining = True
  response = post(gate)
  assert response.status_code == 503 and response.headers["Retry-After"] == "1" and "stopping" in message(response)
  assert post(gate, path="/metrics", method="GET").status_code == 200


def test_a_failed_application_is_not_active():
  async def fails(scope, receive, send):
    assert gate.active == 1
    raise RuntimeError("on purpose")

  gate = Gate(fails, None, 100)
  with contextlib.suppress(RuntimeError):
    post(gate)
  assert gate.active == 0
