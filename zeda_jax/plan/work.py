"""FLOPs of a stage by kind, from shapes: what the method needs, whatever the compiler makes of it.

A multiply-add is 2 FLOPs. Attention is causal: half of the pairs of a row, as if it held one sequence (packed rows have
less). Of the routed experts (1 - r_ZE) is executed by the student, all by the teacher. A pass over a layer counts

  forward     1
  backward    2, 1 where the weights are frozen; attention's pairs 3.5: its two kernels make the logits again
  again       what the backward pass makes again: with remat "layer" all of it; the experts' first product always
  head        logits are made twice, forward and backward, by student and teacher; the student's two gradients
"""

import dataclasses
from typing import NamedTuple

from zeda_jax.analysis.flops import LayerFlops, decode_flops, prefill_flops
from zeda_jax.config import ModelConfig


class Work(NamedTuple):
  """FLOPs of one step on all chips."""

  attention: float  # projections
  pairs: float  # logits and values
  router: float
  experts: float
  dense: float  # shared experts and dense layers
  head: float

  @property
  def total(self) -> float:
    return sum(self)


@dataclasses.dataclass(frozen=True)
class Passes:
  """How often each kind of work is done, relative to one forward pass."""

  matrices: float
  pairs: float
  experts: float
  head: float


def forward(config: ModelConfig, length: int, zero_ratio: float = 0.0) -> Work:
  """One row of `length` tokens through the model and its head."""
  one, two = (prefill_flops(config, n).attention for n in (1, 2))
  per_pair = (two - 2 * one) / 2  # the rest of `one` is linear in the row's length
  layer = prefill_flops(config, length, zero_ratio)
  dense_layers = config.num_layers - sum(config.moe_layers)
  pairs = config.num_layers * per_pair * length**2  # which prefill_flops counts, causal or not
  return _whole(config, layer, pairs, dense_layers, length)._replace(pairs=pairs / 2)


def decoded(config: ModelConfig, before: int, new: int, zero_ratio: float = 0.0) -> Work:
  """One row of `before` tokens to which `new` ones are added, one by one, with the head for each of them."""
  length = before + new
  ends = [decode_flops(config, n, zero_ratio) for n in (length, max(before, 1))]
  layer = LayerFlops(*(last - first for last, first in zip(*ends, strict=True)))
  one, two = (decode_flops(config, n).attention for n in (1, 2))
  per_pair = two - 2 * one
  pairs = config.num_layers * per_pair / 2 * (length * (length - 1) - before * (before - 1))
  return _whole(config, layer, pairs, config.num_layers - sum(config.moe_layers), new)


def _whole(config: ModelConfig, layer: LayerFlops, pairs: float, dense_layers: int, tokens: int) -> Work:
  """Of all layers and the head; `pairs` of the layers' attention is not projections."""
  moe_layers = sum(config.moe_layers)
  return Work(
    attention=config.num_layers * layer.attention - pairs,
    pairs=pairs,
    router=moe_layers * layer.router,
    experts=moe_layers * layer.experts,
    dense=moe_layers * layer.shared + dense_layers * 6.0 * tokens * config.hidden_size * config.intermediate_size,
    head=2.0 * tokens * config.hidden_size * config.vocab_size,
  )


def student_passes(config: ModelConfig, trainable: str) -> Passes:
  """Forward, backward and what is made again."""
  again = 1.0 if config.remat == "layer" else 0.0
  backward = 2.0 if trainable == "all" else 1.0
  exchanged = config.sharding is not None and config.sharding.expert_devices > 1
  # Where rows are exchanged the backward pass keeps no buffer: it makes gate and up again.
  experts_again = 2 / 3 if exchanged else 0.0 if config.remat == "none" else 1.0
  return Passes(1 + backward + again, 1 + 3.5 + again, 1 + backward + experts_again, 2 + backward)


TEACHER = Passes(1.0, 1.0, 1.0, 2.0)


def training(
  config: ModelConfig, rows: int, length: int, trainable: str, zero_ratio: float = 0.0, teacher_runs: bool = True
) -> Work:
  """A step on `rows` rows, with the teacher's forward pass if it runs; `config` is the student's."""
  student = _times(forward(config, length, zero_ratio), student_passes(config, trainable))
  teacher = _times(forward(config.replace(num_zero_experts=0), length), TEACHER if teacher_runs else Passes(0, 0, 0, 0))
  return Work(*(rows * (a + b) for a, b in zip(student, teacher, strict=True)))


def _times(work: Work, passes: Passes) -> Work:
  return Work(
    attention=work.attention * passes.matrices,
    pairs=work.pairs * passes.pairs,
    router=work.router * passes.matrices,
    experts=work.experts * passes.experts,
    dense=work.dense * passes.matrices,
    head=work.head * passes.head,
  )
