"""A full server, the API key, bad options, and the orderly end."""

import asyncio
import importlib.util
import signal
import socket
import subprocess
import sys

import httpx
import openai
import pytest

from tests.serve.server_process import REPOSITORY, Server
from zeda_jax.cli import main as cli

KEY = "sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
LONG = {"model": "tiny", "prompt": "Z", "max_tokens": 600, "ignore_eos": True, "seed": 1}


@pytest.fixture
def server(model_path):
  flags = ["--num-slots=2", "--max-queue=1", "--warmup-length=0", "--model-name=tiny", "--max-body-bytes=2000"]
  with Server(model_path, *flags, ZEDA_API_KEY=KEY) as server:
    yield server


def client(server):
  return httpx.AsyncClient(base_url=server.root, headers=HEADERS, timeout=120)


async def in_flight(server, count):
  while server.metrics()["zeda_in_flight_responses"] != count:
    await asyncio.sleep(0.02)


def test_limits_and_the_orderly_end(server):
  """One server, from its first request to its last."""
  with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
    openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0).models.list()
  assert [m.id for m in openai.OpenAI(base_url=server.url, api_key=KEY).models.list()] == ["tiny"]
  assert "sesame" not in server.output and "warning" not in server.output

  async def fill_and_stop():
    async with client(server) as web:
      too_large = await web.post("/v1/completions", json=LONG | {"prompt": "x" * 2000})
      assert too_large.status_code == 413 and too_large.json()["error"]["code"] == "body_too_large"
      alone = await web.post("/v1/completions", json=LONG)
      asked = [asyncio.create_task(web.post("/v1/completions", json=LONG)) for _ in range(2)]
      await in_flight(server, 2)

      async def stream():
        async with web.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
          return response.status_code, [line async for line in response.aiter_lines() if line]

      streamed = asyncio.create_task(stream())
      await in_flight(server, 3)
      full = await web.post("/v1/completions", json=LONG)
      assert full.status_code == 429 and full.headers["Retry-After"] == "1"
      assert full.json()["error"]["type"] == "rate_limit_error"
      assert full.json()["error"]["message"].startswith("The server is full: 3 responses run or wait, of at most 3")

      server.process.send_signal(signal.SIGTERM)
      server.wait_for("stopping: 3 requests are being answered")
      health, refused = await web.get("/health"), await web.post("/v1/completions", json=LONG)
      assert (health.status_code, health.text, refused.status_code) == (503, "draining", 503)
      assert refused.json()["error"]["code"] == "draining"

      expected = alone.json()["choices"]
      for task in asked:
        assert (await task).json()["choices"] == expected
      status, lines = await streamed
      assert status == 200 and lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]

  asyncio.run(fill_and_stop())
  assert server.process.wait(30) == 0
  with pytest.raises(httpx.ConnectError):
    httpx.get(f"{server.root}/health")
  assert "Traceback" not in server.output


@pytest.mark.slow
def test_a_second_signal_cuts_off(server):
  async def run():
    async with client(server) as web:
      asked = asyncio.create_task(web.post("/v1/completions", json=LONG))
      await in_flight(server, 1)
      server.process.send_signal(signal.SIGINT)
      server.wait_for("stopping: 1 requests are being answered")
      server.process.send_signal(signal.SIGINT)
      with pytest.raises(httpx.HTTPError):
        (await asked).raise_for_status()

  asyncio.run(run())
  assert server.process.wait(30) == 1
  assert "1 requests are cut off" in server.output


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    (["--num-slots=0"], "--num-slots is 0; expected at least 1"),
    (["--max-queue=-1"], "--max-queue is -1; expected at least 0"),
    (["--port=70000"], "--port is 70000"),
    (["--api-key=ü"], "the API key is empty or has characters"),
    (["--zero-expert-bias=nan"], "--zero-expert-bias is nan"),
  ],
)
def test_bad_options(model_path, capsys, flags, expected):
  assert cli.main(["serve", str(model_path), *flags]) == 2
  found = capsys.readouterr()
  assert expected in found.err and found.err.count("\n") == 1


def test_bad_directory_and_address(model_path, tmp_path, capsys):
  assert cli.main(["serve", str(tmp_path)]) == 2
  assert "config.json does not exist" in capsys.readouterr().err
  with socket.create_server(("127.0.0.1", 0)) as taken:
    assert cli.main(["serve", str(model_path), f"--port={taken.getsockname()[1]}"]) == 2
  assert "Address already in use; choose another with --host and --port" in capsys.readouterr().err


def test_missing_extra(model_path, monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
  assert cli.main(["serve", str(model_path)]) == 2
  assert capsys.readouterr().err == "zeda serve: uvicorn is not installed: pip install 'zeda-jax[serve]'.\n"


def test_help_imports_little():
  code = (
    "import sys; from zeda_jax.cli.main import main\ntry:\n  main(['serve', '--help'])\nexcept SystemExit:\n  pass\n"
  )
  code += "print([name for name in ('jax', 'fastapi', 'pydantic', 'transformers') if name in sys.modules])"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
  assert result.stdout.splitlines()[-1] == "[]" and "--max-queue" in result.stdout
