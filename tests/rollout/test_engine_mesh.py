"""The engine on a mesh of four devices gives the tokens of one device; in a process of its own, with fake devices."""

import jax
import numpy as np
import pytest

from tests.multiprocess import run_everywhere
from tests.tiny_models import GLM, tiny_model
from zeda_jax.models.params import merge_model, reconfigured, split_model
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.requests import Request
from zeda_jax.sharding import Rules, Sharding, make_mesh

FAMILIES = {"qwen3": {"moe_layers": (True,)}, "glm": GLM}
RNG = np.random.default_rng(0)
REQUESTS = [
  Request(RNG.integers(0, 64, length).tolist(), 12, seed=1, stream=10 * i, n=n, temperature=t, stop_ids=(7,))
  for i, (length, n, t) in enumerate([(5, 1, 1.0), (16, 5, 1.0), (1, 2, 0.7), (17, 1, 0.0), (14, 3, 1.0), (9, 1, 1.0)])
]


def answers(model, **sizes):
  engine = Engine(model, page_size=4, chunk_steps=5, max_length=32, prefill_tokens=1, **sizes)
  found = {(place, c.index): c for place, c in engine.run(REQUESTS)}
  assert engine.statistics().pages_used == 0
  return [found[key] for key in sorted(found)], engine


def check(family):
  model = tiny_model(num_experts=8, num_zero_experts=4, **FAMILIES[family])
  expected, _ = answers(model, num_slots=4)
  assert 0.1 < np.mean([c.zero_ratio for c in expected]) < 0.9
  sharding = Sharding(make_mesh(2, 2), rules=Rules(replicated_below=0))
  graphdef, params = split_model(reconfigured(model, sharding=sharding))
  spread = merge_model(graphdef, jax.device_put(params, sharding.state(params)))
  found, engine = answers(spread, num_slots=8, max_tokens=160)  # so few pages that responses are set back
  assert [c.tokens for c in found] == [c.tokens for c in expected]
  for mine, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
    assert mine.zero_ratio_all == theirs.zero_ratio_all
  assert engine.statistics().preemptions > 0
  assert engine._pages[0].addressable_shards[0].data.shape[1] == engine._pages[0].shape[1] // 4


@pytest.mark.parametrize("family", ["glm", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_tokens_of_one_device(family):
  run_everywhere("tests.rollout.test_engine_mesh:check", 1, 4, family)
