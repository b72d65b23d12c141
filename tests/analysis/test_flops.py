"""FLOPs against the paper's table (Appendix D) and against sums taken token by token."""

import dataclasses

import pytest

from tests.tiny_models import GLM_4_7_FLASH, QWEN3_30B_A3B
from zeda_jax.analysis.flops import decode_flops, expert_flops_left, prefill_flops, theoretical_speedup
from zeda_jax.errors import ZedaError

TABLE = {
  "prefill": ["1.403", "1.341", "1.296", "1.261", "1.234", "1.212", "1.194", "1.178"],
  "decode": ["1.443", "1.403", "1.370", "1.341", "1.317", "1.296", "1.278", "1.261"],
}
ROWS = [(stage, 1024 * (i + 1), value) for stage, values in TABLE.items() for i, value in enumerate(values)]


@pytest.mark.parametrize("num_zero_experts", [0, 64], ids=["static", "dynamic"])
@pytest.mark.parametrize("stage, length, expected", ROWS)
def test_speedup_equals_the_papers_table(stage, length, expected, num_zero_experts):
  config = QWEN3_30B_A3B.replace(num_zero_experts=num_zero_experts)
  assert f"{theoretical_speedup(config, length, stage=stage):.3f}" == expected
  assert theoretical_speedup(config, length, 0.5, stage) == theoretical_speedup(config, length, stage=stage)


def test_prefill_flops_product_by_product():
  length, hidden, heads, kv_heads, head_dim = 100, 2048, 32, 4, 128
  matmul = lambda m, k, n: 2 * m * k * n
  flops = prefill_flops(QWEN3_30B_A3B.replace(num_zero_experts=64), length, zero_ratio=0.25)
  projections = 2 * matmul(length, hidden, heads * head_dim) + 2 * matmul(length, hidden, kv_heads * head_dim)
  products = heads * (matmul(length, head_dim, length) + matmul(length, length, head_dim))
  assert flops.attention == projections + products
  assert flops.router == matmul(length, hidden, 128 + 64)
  assert flops.experts == 6 * length * 3 * matmul(1, hidden, 768)  # 6 of the 8 picks run, 3 products each
  assert flops.total == flops.attention + flops.router + flops.experts


def test_decode_flops_token_by_token():
  length, width = 100, 32 * 128
  prefill, decode = prefill_flops(QWEN3_30B_A3B, length), decode_flops(QWEN3_30B_A3B, length)
  assert (decode.router, decode.experts) == (prefill.router, prefill.experts)
  seen = sum(4 * earlier * width for earlier in range(length))
  assert decode.attention == prefill.attention - 4 * length**2 * width + seen


@pytest.mark.parametrize("q_lora_rank", [768, None])
def test_latent_attention_product_by_product(q_lora_rank):
  length, hidden, heads, rank, nope, rotary, value = 100, 2048, 20, 512, 192, 64, 256
  config = GLM_4_7_FLASH.replace(mla=dataclasses.replace(GLM_4_7_FLASH.mla, q_lora_rank=q_lora_rank))
  matmul = lambda m, k, n: 2 * m * k * n
  queries = (
    matmul(length, hidden, heads * 256)
    if q_lora_rank is None
    else matmul(length, hidden, 768) + matmul(length, 768, heads * 256)
  )
  shared = queries + matmul(length, hidden, rank + rotary) + matmul(length, heads * value, hidden)
  expand = matmul(length, rank, heads * (nope + value))
  products = heads * (matmul(length, nope + rotary, length) + matmul(length, length, value))
  prefill = prefill_flops(config, length)
  assert prefill.attention == shared + expand + products
  assert prefill.router == matmul(length, hidden, 64)
  assert prefill.experts == 4 * length * 3 * matmul(1, hidden, 1536)
  assert prefill.shared == length * 3 * matmul(1, hidden, 1536)
  assert prefill.total == prefill.attention + prefill.router + prefill.experts + prefill.shared
  absorb = heads * (matmul(length, nope, rank) + matmul(length, rank, value))
  steps = sum(heads * (matmul(1, rank + rotary, seen) + matmul(1, seen, rank)) for seen in range(length))
  assert decode_flops(config, length).attention == shared + absorb + steps


def test_glm_gains_less_than_the_experts_alone_since_the_shared_one_stays():
  speedups = [theoretical_speedup(GLM_4_7_FLASH, 1024, stage=stage) for stage in ("prefill", "decode")]
  assert all(1.1 < value < 2 for value in speedups)
  more = [theoretical_speedup(GLM_4_7_FLASH.replace(num_shared_experts=n), 1024) for n in (0, 1, 2)]
  assert more == sorted(more, reverse=True)


def test_speedup_without_skipping_is_the_cost_of_the_wider_router():
  assert 0.99 < theoretical_speedup(QWEN3_30B_A3B, 1024, zero_ratio=0.0) < 1.0
  wide = QWEN3_30B_A3B.replace(num_zero_experts=128)
  assert theoretical_speedup(wide, 1024) < theoretical_speedup(QWEN3_30B_A3B, 1024)


def test_dense_layers_are_not_counted():
  mixed = QWEN3_30B_A3B.replace(moe_layers=(True, False) * 24)
  assert theoretical_speedup(mixed, 1024) == theoretical_speedup(QWEN3_30B_A3B, 1024)


def test_expert_flops_left():
  assert [expert_flops_left(r) for r in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"length": 1024, "stage": "training"}, "stage is 'training'; expected 'prefill' or 'decode'"),
    ({"length": 0}, "length is 0"),
    ({"length": 1024, "zero_ratio": 1.5}, "zero_ratio is 1.5"),
    ({"length": 1024, "zero_ratio": float("nan")}, "zero_ratio is nan"),
  ],
)
def test_bad_arguments_are_refused(arguments, message):
  with pytest.raises(ZedaError, match=message):
    theoretical_speedup(QWEN3_30B_A3B, **arguments)
