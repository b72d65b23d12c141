"""A server on four devices gives the answers of one."""

import os

import httpx
import numpy as np
import pytest

from tests.multiprocess import environment
from tests.serve.server_process import Server

BODIES = [
  {"prompt": [[9], [7, 8, 9, 10, 11], list(range(20, 50))], "max_tokens": 30, "temperature": 0, "ignore_eos": True},
  {"prompt": ["12+34=", "print(1)"], "max_tokens": 5, "n": 3, "seed": 1, "echo": True, "logprobs": 2},
  {"prompt": [[5, 6, 7], list(range(20, 60))], "max_tokens": 0, "echo": True, "logprobs": 0},
]


@pytest.mark.slow
def test_four_devices(server, model_path):
  variables = {name: value for name, value in environment(4).items() if os.environ.get(name) != value}
  with Server(model_path, "--num-slots=6", "--max-length=1024", "--warmup-length=0", **variables) as spread:
    assert "8 slots" in spread.output  # 6, rounded up
    for body in BODIES:
      ask = lambda url, body=body: httpx.post(f"{url}/completions", json={"model": "half", **body}, timeout=300).json()
      expected, found = ask(server.url), ask(spread.url)
      assert [choice["text"] for choice in found["choices"]] == [choice["text"] for choice in expected["choices"]]
      assert found["usage"]["zero_expert_ratio"] == pytest.approx(expected["usage"]["zero_expert_ratio"], abs=2e-3)
      for mine, theirs in zip(found["choices"], expected["choices"], strict=True):
        if mine["logprobs"]:
          pairs = [[x or 0.0 for x in choice["logprobs"]["token_logprobs"]] for choice in (mine, theirs)]
          np.testing.assert_allclose(*pairs, rtol=0, atol=1e-4)
    assert spread.wait_until_idle()["zeda_cache_pages_used"] == 0
