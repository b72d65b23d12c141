"""Sizes of the models, how they shrink, and options that make no sense."""

import dataclasses

import pytest

from tests.tiny_models import QWEN3_30B_A3B
from zeda_jax.bench.shapes import RATIOS, SHAPES, Options, scaled, scaling_note
from zeda_jax.config import read_config
from zeda_jax.demo import TEACHER
from zeda_jax.errors import ZedaError


def test_the_models():
  config = QWEN3_30B_A3B
  qwen3 = (config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok)
  demo = read_config(TEACHER)
  assert [s.tokens for s in SHAPES.values()][:6] == [8192, 256, 32] * 2
  assert SHAPES["qwen3-30b-a3b/prefill"][2:] == SHAPES["qwen3-30b-a3b/decode-32"][2:] == qwen3
  assert SHAPES["glm-4.7-flash/decode-256"][2:] == (2048, 1536, 64, 4)
  assert SHAPES["demo"][2:] == (demo.hidden_size, demo.moe_intermediate_size, demo.num_experts, 4)
  assert RATIOS == (0, 0.25, 0.5, 0.75)


@pytest.mark.parametrize(
  ("scale", "tokens", "experts"), [(1.0, 8192, 128), (0.125, 1024, 128), (0.0625, 512, 64), (0.001, 8, 16)]
)
def test_scaling(scale, tokens, experts):
  shape = scaled(SHAPES["qwen3-30b-a3b/prefill"], scale)
  assert (shape.tokens, shape.experts, shape.picks) == (tokens, experts, 8 * tokens)
  assert shape.zero_experts >= shape.top_k
  note = scaling_note([shape], scale)
  assert ("full size" in note) == (scale == 1.0)
  assert (f"8192 → {tokens} tokens" in note) == (scale < 1.0)
  assert (f"128 → {experts} experts" in note) == (experts < 128)


def test_at_least_one_token():
  assert scaled(SHAPES["glm-4.7-flash/decode-32"], 0.001).tokens == 1


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({"shapes": ("qwen",)}, "shape 'qwen' is unknown; expected one of qwen3-30b-a3b/prefill"),
    ({"shapes": ()}, "nothing to measure"),
    ({"ratios": (0.0, 1.0)}, "zero ratio 1 is"),
    ({"ratios": (-0.5,)}, "zero ratio -0.5 is"),
    ({"dtype": "float16"}, "dtype is 'float16'; expected float32 or bfloat16"),
    ({"scale": 0.0}, "scale is 0"),
    ({"scale": 2.0}, "scale is 2"),
    ({"repeats": 0}, "repeats is 0"),
    ({"max_seconds": float("nan")}, "max_seconds is nan"),
  ],
)
def test_refused(change, expected):
  with pytest.raises(ZedaError, match=expected):
    dataclasses.replace(Options(), **change)
