"""FLOPs of a step, against counts by hand and against each other."""

import pytest

from tests.tiny_models import GLM_4_7_FLASH, QWEN3_30B_A3B, tiny_config
from zeda_jax.analysis.flops import prefill_flops
from zeda_jax.plan import work


def test_forward_of_the_real_models_by_hand():
  length = 8192
  qwen = work.forward(QWEN3_30B_A3B, length)
  assert qwen.attention == 48 * length * 2 * 2048 * (4096 + 512 + 512 + 4096)
  assert qwen.pairs == 48 * length**2 / 2 * 4 * 4096
  assert qwen.experts == 48 * length * 8 * 3 * 2 * 2048 * 768
  assert qwen.head == length * 2 * 2048 * 151936
  assert qwen.dense == 0
  glm = work.forward(GLM_4_7_FLASH, length)
  assert glm.dense == 6 * length * 2048 * (46 * 1536 + 10240)  # shared experts; the first layer
  assert glm.pairs == pytest.approx(47 * length**2 / 2 * 2 * 20 * (256 + 256))


def test_skipping_halves_the_students_experts_alone():
  config = QWEN3_30B_A3B.replace(num_zero_experts=64, remat="layer")
  whole, half = (work.training(config, 1, 1024, "all", r) for r in (0.0, 0.5))
  teacher = work.forward(QWEN3_30B_A3B, 1024).experts
  assert half.experts - teacher == pytest.approx((whole.experts - teacher) / 2)
  assert half._replace(experts=0) == whole._replace(experts=0)
  router = work.training(config, 1, 1024, "router", 0.5)
  assert router.total < half.total


def test_decoding_adds_up_token_by_token():
  config = tiny_config()
  one_by_one = sum(work.decoded(config, n, 1).total for n in range(4, 10))
  assert work.decoded(config, 4, 6).total == pytest.approx(one_by_one)


@pytest.mark.parametrize("prompt, new", [(1024, 1), (1024, 32768)])
def test_decoded_tokens_by_hand(prompt, new):
  found = work.decoded(QWEN3_30B_A3B, prompt, new)
  assert found.attention == pytest.approx(48 * new * 2 * 2048 * (4096 + 512 + 512 + 4096))
  earlier = sum(range(prompt, prompt + new))  # tokens that each new one looks back on
  assert found.pairs == pytest.approx(48 * earlier * 4 * 4096)
  assert found.experts == pytest.approx(48 * new * 8 * 3 * 2 * 2048 * 768)
  assert found.head == new * 2 * 2048 * 151936


def test_the_papers_layer_is_what_is_summed():
  layer = prefill_flops(QWEN3_30B_A3B, 4096)
  whole = work.forward(QWEN3_30B_A3B, 4096)
  assert whole.attention + 2 * whole.pairs == pytest.approx(48 * layer.attention)
