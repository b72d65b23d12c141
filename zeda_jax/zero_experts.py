"""Zero experts: the idea of this package in one file.

A post-trained mixture of experts has N normal experts and runs the best K of them for each token. Injection adds N_Z
*zero experts* (ids N .. N+N_Z-1) to the router: they have a router row each but no weights, and their output is
exactly 0. K does not change, so every zero expert among the K picks is an expert matmul that need not happen.

  router rows   [N + N_Z, H]     the first N unchanged, the new ones drawn around them   (router_rows.py)
  scores        [T, N + N_Z]     softmax over all of them, or the sigmoid of each        (router_scores)
  picks         [T, K]           ids of the best K; ids >= N cost nothing                (route)
  output        sum over picks < N of weight * expert(x)                                 (models/moe.py)

Training pulls the share of zero picks to w N_Z / (N + w N_Z) with one balance loss between the two *groups*
(group_balance_loss); which token skips which expert is left to the router.

Source: "Post-Trained MoE Can Skip Half Experts via Self-Distillation", arXiv 2605.18643.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.router_rows import new_router_rows
from zeda_jax.sharding import Exchange

__all__ = [
  "Routing",
  "adamoe_balance_loss",
  "choice_scores",
  "expert_balance_loss",
  "group_balance_loss",
  "new_router_rows",
  "route",
  "router_scores",
  "target_ratio",
  "zero_expert_ratio",
]


class Routing(NamedTuple):
  """Where each token goes. E = N + N_Z; ids >= N mean "no expert", whether a zero expert or a dropped pick."""

  scores: Float[Array, "T E"]  # for the balance losses, which want rows that sum to 1 (see models/moe.py, Router)
  picks: Int[Array, "T K"]
  weights: Float[Array, "T K"]
  exchange: Exchange | None = None  # what was sent between devices for it; None where experts are not spread
  replaced: Int[Array, " T"] | None = None  # of a token's own picks, those that replay left out; None without replay


def router_scores(
  logits: Float[Array, "T N"],
  zero_logits: Float[Array, "T Z"] | None,
  zero_expert_bias: float | Array = 0.0,
  scoring: str = "softmax",
) -> Float[Array, "T E"]:
  """Softmax over normal and zero experts together, or the sigmoid of each; `zero_expert_bias` is added to zero logits.

  Equals softmax(concat([logits, zero_logits + bias])). The two groups are reduced apart so that with a bias of -inf
  the zero group adds exactly 0.0 to every sum: the result is then bit-identical to the static teacher's.
  """
  if scoring == "sigmoid":
    scores = jax.nn.sigmoid(logits)
    if zero_logits is None:
      return scores
    return jnp.concatenate([scores, jax.nn.sigmoid(zero_logits + zero_expert_bias)], axis=-1)
  best = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  if zero_logits is None:
    exp = jnp.exp(logits - best)
    return exp / exp.sum(axis=-1, keepdims=True)
  zero_logits = zero_logits + zero_expert_bias
  best = jnp.maximum(best, jax.lax.stop_gradient(zero_logits.max(axis=-1, keepdims=True)))
  exp, zero_exp = jnp.exp(logits - best), jnp.exp(zero_logits - best)
  total = exp.sum(axis=-1, keepdims=True) + zero_exp.sum(axis=-1, keepdims=True)
  return jnp.concatenate([exp / total, zero_exp / total], axis=-1)


def route(
  scores: Float[Array, "T E"],
  top_k: int,
  num_experts: int,
  *,
  correction: Float[Array, " E"] | None = None,
  num_groups: int = 1,
  top_groups: int = 1,
  normalize: bool = True,
  scaling: float = 1.0,
  renormalize: bool = False,
  execute_top_k: int | None = None,
  skip_threshold: float = 0.0,
  replay: Int[Array, "T K"] | None = None,
) -> Routing:
  """Picks the best K of all experts. Weights are normalised over all K picks, zero ones included (paper section 3.1).

  Args:
    scores: of all E = N + N_Z experts; rows of softmax scores sum to 1, those of sigmoid scores need not.
    top_k: K.
    num_experts: N; ids from N on are zero experts.
    correction: added to the scores for the choice of the picks only, so that no gradient reaches it.
    num_groups: see `choice_scores`.
    top_groups: see `choice_scores`.
    normalize: whether the weights of all K picks sum to 1 (before `scaling`).
    scaling: factor of all weights.
    renormalize: scale the normal picks' weights up to the sum that all K have. The paper does not (Table 6: it costs
      1.7 points).
    execute_top_k: run only the best k1 of the K picks, weights still normalised over all K (arXiv 2609.04575). The best
      are those that the router would choose if K were k1.
    skip_threshold: dynamic skipping; drop picks scoring below beta x the best pick and renormalise the rest.
    replay: picks to take instead of the best (routing replay, paper section 3.3), with the weights that the scores give
      them; a token whose row is negative has none and takes the best.

  execute_top_k and skip_threshold are training-free baselines that drop picks of a static model. A dropped pick gets
  the id E, so that everything below treats it like a zero expert.
  """
  if correction is None and num_groups == 1:
    values, picks = jax.lax.top_k(scores, top_k)
  else:
    choice = choice_scores(jax.lax.stop_gradient(scores), num_experts, correction, num_groups, top_groups)
    picks = jax.lax.top_k(choice, top_k)[1]
    values = jnp.take_along_axis(scores, picks, axis=-1)
  replaced = None
  if replay is not None:
    best, picks = picks, jnp.where(replay[:, :1] < 0, picks, replay.astype(picks.dtype))
    values = jnp.take_along_axis(scores, picks, axis=-1)
    replaced = (best[:, :, None] != picks[:, None, :]).all(axis=-1).sum(axis=-1)
  dropped = jnp.asarray(scores.shape[-1], picks.dtype)
  if skip_threshold > 0.0:
    keep = values >= skip_threshold * values.max(axis=-1, keepdims=True)
    values, picks = jnp.where(keep, values, 0.0), jnp.where(keep, picks, dropped)
  if normalize:
    # 1e-20 is for sigmoid scores that all underflow; it changes no bit of a sum that is not tiny.
    values = values / (values.sum(axis=-1, keepdims=True) + 1e-20)
  if renormalize:
    surviving = jnp.where(picks < num_experts, values, 0.0)
    left = surviving.sum(axis=-1, keepdims=True)
    values = surviving * (values.sum(axis=-1, keepdims=True) / jnp.where(left > 0, left, 1.0))  # none may survive
  if scaling != 1.0:
    values = values * scaling
  if execute_top_k is not None:
    keep = jnp.arange(top_k) < execute_top_k
    values, picks = jnp.where(keep, values, 0.0), jnp.where(keep, picks, dropped)
  return Routing(scores, picks, values, replaced=replaced)


def choice_scores(
  scores: Float[Array, "T E"],
  num_experts: int,
  correction: Float[Array, " E"] | None = None,
  num_groups: int = 1,
  top_groups: int = 1,
) -> Float[Array, "T E"]:
  """What the best K are chosen by: score plus correction bias, -inf where an expert may not be picked.

  The N normal experts lie in `num_groups` equal groups, of which a token may use the `top_groups` whose two best
  experts have the largest sum. Zero experts are in no group and always compete, but for those with a score of
  exactly 0: they are masked, and a correction bias does not bring them back.
  """
  choice = scores if correction is None else scores + correction
  normal, zero = choice[:, :num_experts], choice[:, num_experts:]
  if num_groups > 1:
    grouped = normal.reshape(-1, num_groups, num_experts // num_groups)
    group_scores = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
    best = jax.lax.top_k(group_scores, top_groups)[1]
    allowed = (best[:, :, None] == jnp.arange(num_groups)).any(axis=1)  # [T, G]: whether a group is among the best
    normal = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(normal.shape)
  zero = jnp.where(scores[:, num_experts:] > 0, zero, -jnp.inf)
  return jnp.concatenate([normal, zero], axis=-1)


def _token_mask(mask: Bool[Array, " T"] | None, num_tokens: int) -> tuple[Bool[Array, " T"], Float[Array, ""]]:
  mask = jnp.ones(num_tokens, bool) if mask is None else mask.astype(bool).reshape(num_tokens)
  return mask, jnp.maximum(mask.sum(), 1).astype(jnp.float32)


def group_balance_loss(
  scores: Float[Array, "T E"],
  picks: Int[Array, "T K"],
  num_experts: int,
  weight: float | Array = 2.0,
  coefficient: float | Array = 0.1,
  mask: Bool[Array, " T"] | None = None,
) -> Float[Array, ""]:
  """The group auxiliary loss L_GA of one layer (paper section 3.2).

      f_E, f_Z = picks per token that are normal, zero      (a count: no gradient; f_E + f_Z = K)
      P_E, P_Z = mean score mass on normal, zero experts    (P_E + P_Z = 1)
      L_GA = coefficient (N + w N_Z) / K (f_E P_E / N + f_Z P_Z / (w N_Z))

  Both terms balance where the zero-expert ratio f_Z / K is w N_Z / (N + w N_Z); there L_GA = coefficient.

  Args:
    scores: scores over all E = N + N_Z experts, each row summing to 1 (`Routing.scores`; sigmoid scores are divided by
      their sum over all E).
    picks: the picks of the real routing; ids >= num_experts are zero experts.
    num_experts: N.
    weight: w, how much more a zero expert is to be used than a normal one.
    coefficient: alpha.
    mask: True for real tokens; padding counts neither in f nor in P nor in T.
  """
  num_zero = scores.shape[-1] - num_experts
  mask, num_tokens = _token_mask(mask, scores.shape[0])
  is_normal = (picks < num_experts) & mask[:, None]
  is_zero = (picks >= num_experts) & mask[:, None]
  scores = jnp.where(mask[:, None], scores, 0.0)
  f_normal, f_zero = is_normal.sum() / num_tokens, is_zero.sum() / num_tokens
  p_normal, p_zero = scores[:, :num_experts].sum() / num_tokens, scores[:, num_experts:].sum() / num_tokens
  scale = coefficient * (num_experts + weight * num_zero) / picks.shape[-1]
  return scale * (f_normal * p_normal / num_experts + f_zero * p_zero / (weight * num_zero))


def expert_balance_loss(
  scores: Float[Array, "T E"],
  picks: Int[Array, "T K"],
  coefficient: float | Array = 0.1,
  mask: Bool[Array, " T"] | None = None,
) -> Float[Array, ""]:
  """The ordinary expert-level balance loss L_A = coefficient E / K sum_i f_i P_i, as an ablation.

  It pulls all E experts to equal load and so destroys the routing that post-training learnt (paper Table 10).
  """
  f, p = _loads(scores, picks, mask)
  return coefficient * scores.shape[-1] / picks.shape[-1] * (f * p).sum()


def adamoe_balance_loss(
  scores: Float[Array, "T E"],
  picks: Int[Array, "T K"],
  num_experts: int,
  coefficient: float | Array = 0.1,
  mask: Bool[Array, " T"] | None = None,
) -> Float[Array, ""]:
  """AdaMoE's balance loss, a baseline: L_A in which every zero expert counts with the mean load of all of them.

  Source: "AdaMoE: Token-Adaptive Routing with Null Experts", arXiv 2406.13233, section 3.
  """
  f, p = _loads(scores, picks, mask)
  is_normal = jnp.arange(f.shape[0]) < num_experts
  f = jnp.where(is_normal, f, f[num_experts:].mean())
  return coefficient * scores.shape[-1] / picks.shape[-1] * (f * p).sum()


def _loads(
  scores: Float[Array, "T E"], picks: Int[Array, "T K"], mask: Bool[Array, " T"] | None
) -> tuple[Float[Array, " E"], Float[Array, " E"]]:
  """(picks per token, mean score) of every expert, over the tokens that count."""
  num_all = scores.shape[-1]
  mask, num_tokens = _token_mask(mask, scores.shape[0])
  # f[i] = how often expert i was picked: the sum over (token, slot) of one_hot(picks).
  ids = jnp.where(mask[:, None], picks, num_all).reshape(-1)
  f = jnp.bincount(ids, length=num_all + 1)[:num_all] / num_tokens
  return f, jnp.where(mask[:, None], scores, 0.0).sum(axis=0) / num_tokens


def zero_expert_ratio(
  picks: Int[Array, "*layers_batch T K"],
  num_experts: int,
  mask: Bool[Array, "*batch T"] | None = None,
  axis: int | tuple[int, ...] | None = None,
) -> Float[Array, "*kept"]:
  """r_ZE: the share of picks that are zero experts, over the tokens where `mask` is set.

  Args:
    picks: routing of any number of layers and rows, e.g. `model(...).picks` [L, B, T, K].
    num_experts: N; ids >= N are zero experts.
    mask: broadcast against picks.shape[:-1]; None counts every token.
    axis: axes of picks.shape[:-1] to average over; None means all. For picks [L, B, T, K]: (1, 2) gives the ratio per
      layer, 0 per token, (0, 2) per sequence. Where no token counts the ratio is 0.
  """
  is_zero = (picks >= num_experts).mean(axis=-1, dtype=jnp.float32)
  weight = jnp.broadcast_to(jnp.ones((), bool) if mask is None else jnp.asarray(mask).astype(bool), is_zero.shape)
  return jnp.where(weight, is_zero, 0.0).sum(axis=axis) / jnp.maximum(weight.sum(axis=axis), 1)


def target_ratio(num_experts: int, num_zero_experts: int, weight: float = 2.0) -> float:
  """The zero-expert ratio at which the group balance loss is in equilibrium: w N_Z / (N + w N_Z)."""
  return weight * num_zero_experts / (num_experts + weight * num_zero_experts)
