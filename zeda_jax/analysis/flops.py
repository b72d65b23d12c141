"""FLOPs of one MoE decoder layer and the speed-up that skipping promises (paper, Appendix D).

Counted: the attention's products and projections, the router and the executed experts; a multiply-add is 2 FLOPs.
Not counted: norms, activations, rotary embedding, embedding and head. With l tokens, hidden size H, attention width
H_attn = heads * head size, g_kv = key/value heads / heads, expert width H_e, N experts, N_Z zero experts, K picks and
zero ratio r:

  attention, prefill     4 l^2 H_attn      + 4 (1 + g_kv) l H H_attn     (every token sees every token, as in the paper)
  attention, decode      2 l (l-1) H_attn  + 4 (1 + g_kv) l H H_attn     (l tokens one after the other)
  router                 2 (N + N_Z) l H
  experts                6 (1 - r) K l H H_e

Beyond the paper, counted alike: shared experts (6 l H H_e each, never skipped) and multi-head latent attention. With
N_h heads of D = nope + P query dimensions (P rotary) and V value dimensions, latent ranks R (keys, values) and R_q
(queries):

  latent, prefill        2 l^2 N_h (D + V)         + projections         (expanded: keys and values of every head)
  latent, decode         l (l-1) N_h (2 R + P)     + projections         (absorbed: every head reads the latents)
  projections            2 l (H R_q + R_q N_h D + H (R + P) + R N_h (nope + V) + N_h V H)

A model's dense layers (`mlp_only_layers`, `decoder_sparse_step`) are the same before and after, and are left out: all
numbers here are those of one MoE layer, so the speed-up of a model with dense layers is a little lower.
"""

from typing import Literal, NamedTuple

from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError

Stage = Literal["prefill", "decode"]


class LayerFlops(NamedTuple):
  """FLOPs of one MoE layer for a whole sequence."""

  attention: float
  router: float
  experts: float
  shared: float = 0.0  # experts that every token takes

  @property
  def total(self) -> float:
    return self.attention + self.router + self.experts + self.shared


def prefill_flops(config: ModelConfig, length: int, zero_ratio: float = 0.0) -> LayerFlops:
  """FLOPs of one MoE layer that reads `length` tokens at once.

  Args:
    config: its router has num_experts + num_zero_experts rows.
    length: number of tokens.
    zero_ratio: share of the K picks that run no expert, 0 .. 1.

  Raises:
    ZedaError: the length is not positive or the ratio lies outside 0 .. 1.
  """
  _check(length, zero_ratio)
  return _layer_flops(config, length, zero_ratio, token_pairs=length**2, decode=False)


def decode_flops(config: ModelConfig, length: int, zero_ratio: float = 0.0) -> LayerFlops:
  """FLOPs of one MoE layer that generates `length` tokens one by one with a cache; arguments as in `prefill_flops`."""
  _check(length, zero_ratio)
  return _layer_flops(config, length, zero_ratio, token_pairs=length * (length - 1) / 2, decode=True)


def theoretical_speedup(
  config: ModelConfig, length: int, zero_ratio: float = 0.5, stage: Stage | str = "prefill"
) -> float:
  """FLOPs of the static layer over those of the same layer with zero experts.

  Args:
    config: static or dynamic; a static one is taken to get num_experts // 2 zero experts, the default of injection.
    length: number of tokens read (prefill) or generated (decode).
    zero_ratio: share of the picks that fall on zero experts, 0 .. 1.
    stage: "prefill" or "decode".

  Raises:
    ZedaError: another stage, a length that is not positive, or a ratio outside 0 .. 1.
  """
  if stage not in ("prefill", "decode"):
    raise ZedaError(f"stage is {stage!r}; expected 'prefill' or 'decode'.")
  flops = prefill_flops if stage == "prefill" else decode_flops
  dynamic = config if config.is_dynamic else config.replace(num_zero_experts=config.num_experts // 2)
  static = config.replace(num_zero_experts=0)
  return flops(static, length).total / flops(dynamic, length, zero_ratio).total


def expert_flops_left(zero_ratio: float) -> float:
  """Share of the routed experts' FLOPs that is still executed at a zero ratio; the router's few are not experts'."""
  _check(1, zero_ratio)
  return 1.0 - zero_ratio


def _layer_flops(config: ModelConfig, length: int, zero_ratio: float, token_pairs: float, decode: bool) -> LayerFlops:
  hidden = config.hidden_size
  expert = 6 * length * hidden * config.moe_intermediate_size  # gate, up and down
  attention = _attention_flops if config.mla is None else _latent_attention_flops
  return LayerFlops(
    attention=attention(config, length, token_pairs, decode),
    router=2 * (config.num_experts + config.num_zero_experts) * length * hidden,
    experts=(1 - zero_ratio) * config.num_experts_per_tok * expert,
    shared=config.num_shared_experts * expert,
  )


def _attention_flops(config: ModelConfig, length: int, token_pairs: float, decode: bool) -> float:
  width = config.num_heads * config.head_dim
  key_value_share = config.num_kv_heads / config.num_heads
  return 4 * token_pairs * width + 4 * (1 + key_value_share) * length * config.hidden_size * width


def _latent_attention_flops(config: ModelConfig, length: int, token_pairs: float, decode: bool) -> float:
  mla, heads, hidden = config.mla, config.num_heads, config.hidden_size
  assert mla is not None
  rank, queries = mla.kv_lora_rank, heads * config.head_dim
  pair = 2 * rank + mla.rope_head_dim if decode else config.head_dim + mla.v_head_dim
  to_queries = hidden * queries if mla.q_lora_rank is None else mla.q_lora_rank * (hidden + queries)
  between = rank * heads * (mla.nope_head_dim + mla.v_head_dim)  # latents to heads, or queries and outputs to latents
  token = to_queries + hidden * (rank + mla.rope_head_dim) + between + heads * mla.v_head_dim * hidden
  return 2 * token_pairs * heads * pair + 2 * length * token


def _check(length: int, zero_ratio: float) -> None:
  if length < 1:
    raise ZedaError(f"length is {length}; expected at least 1 token.")
  if not 0.0 <= zero_ratio <= 1.0:
    raise ZedaError(f"zero_ratio is {zero_ratio}; expected a share between 0 and 1.")
