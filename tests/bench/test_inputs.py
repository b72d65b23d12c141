"""The routing that is benchmarked: the zero ratio that was asked for, from the layer's own router, unevenly."""

import numpy as np
import pytest

from zeda_jax.bench.inputs import apply, make_layer, picks_at
from zeda_jax.bench.shapes import SHAPES, Shape

# Many experts and few features: the distribution of loads at little cost.
WIDE = Shape("wide", 512, 64, 8, 128, 8)


@pytest.mark.parametrize("shape", [WIDE, SHAPES["demo"]._replace(tokens=33)], ids=["wide", "demo"])
def test_zero_ratios(shape):
  layer, ratios = make_layer(shape, "float32"), (0.0, 0.25, 0.5, 0.75)
  for ratio, picks in zip(ratios, picks_at(layer, ratios), strict=True):
    assert picks.rows == round(shape.picks * (1 - ratio))
    assert picks.zero_ratio == pytest.approx(ratio, abs=1 / shape.picks)
    assert (picks.bias == -np.inf) == (ratio == 0)
    # what the layer itself does at that bias
    chosen = np.asarray(apply(layer.graphdef, layer.params, layer.x, picks.bias)[1].picks)
    np.testing.assert_array_equal(picks.group_sizes, [(chosen == e).sum() for e in range(shape.experts)])
    assert (picks.touched, picks.busiest) == (
      len(set(chosen[chosen < shape.experts].tolist())),
      pytest.approx(picks.group_sizes.max() * shape.experts / picks.rows),
    )


def test_loads_differ_as_the_docstring_says():
  (picks,) = picks_at(make_layer(WIDE, "float32"), (0.0,))
  assert 2.0 < picks.busiest < 5.0
  assert picks.group_sizes.min() < 0.6 * picks.group_sizes.mean()


def test_weights():
  layer = make_layer(SHAPES["demo"]._replace(tokens=7), "bfloat16")
  assert layer.x.shape == (7, 96) and layer.x.dtype == "bfloat16"
  experts = layer.params["experts"]
  assert experts["gate_up"].shape == (16, 96, 96) and experts["down"].shape == (16, 48, 96)
  gate_up = np.asarray(experts["gate_up"], np.float32)
  assert gate_up.std() == pytest.approx(96**-0.5, rel=0.05)
  assert len(np.unique(gate_up[:, 0, 0])) > 10  # no expert is another's copy
  again = make_layer(layer.shape._replace(tokens=3), "bfloat16", params=layer.params)
  assert again.params is layer.params and again.x.shape == (3, 96)
