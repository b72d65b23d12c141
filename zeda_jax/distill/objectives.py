"""What each stage minimises: a loss per response token against the teacher, plus the balance loss over all tokens.

SFT  cross_entropy  -log pi(y_t) on the teacher's rollouts (paper section 3.3)
     forward_kl     KL(teacher || student) over the whole vocabulary
OPD  sampled        policy gradient of its own tokens, advantage log pi_T(y_t) - log pi_old(y_t), ratio-clipped
     reverse_kl     KL(student || teacher) over the whole vocabulary: the same expectation, exact, with less variance
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import AuxLoss, Decoder, HiddenOutput
from zeda_jax.ops.token_losses import TokenLosses, sampled_token_loss, token_losses
from zeda_jax.zero_experts import (
  Routing,
  adamoe_balance_loss,
  expert_balance_loss,
  group_balance_loss,
  zero_expert_ratio,
)

LOSSES = ("cross_entropy", "forward_kl", "sampled", "reverse_kl")
BALANCES = ("group", "expert", "adamoe", "none")
BALANCE_TOKENS = ("all", "response")


@dataclasses.dataclass(frozen=True)
class Objective:
  """The static part of a stage's loss; the weights of the balance loss are runtime values (`Balance`)."""

  loss: str = "forward_kl"
  balance: str = "group"
  balance_tokens: str = "all"  # "response": only the passes that predict response tokens are balanced
  clip_low: float = 0.2
  clip_high: float = 0.2
  chunk_size: int | None = None  # vocabulary columns per chunk; None lets token_losses choose
  teacher_metrics: bool = True  # run the teacher for its metrics even where the loss does not need it

  def __post_init__(self) -> None:
    if self.loss not in LOSSES:
      raise ZedaError(f"loss is {self.loss!r}; expected one of {', '.join(LOSSES)}.")
    if self.balance_tokens not in BALANCE_TOKENS:
      raise ZedaError(f"balance_tokens is {self.balance_tokens!r}; expected one of {', '.join(BALANCE_TOKENS)}.")
    if self.balance not in BALANCES:
      raise ZedaError(f"balance is {self.balance!r}; expected one of {', '.join(BALANCES)}.")

  @property
  def needs_teacher(self) -> bool:
    return self.loss != "cross_entropy" or self.teacher_metrics


def aux_loss(
  objective: Objective, config: Any, balance: Mapping[str, Array], response: Bool[Array, " T"]
) -> AuxLoss | None:
  """The balance loss of one layer, for `Decoder.hidden`; None for static students and balance="none".

  `response` tells the passes that predict response tokens; with balance_tokens="all" every real token counts.
  """
  if objective.balance == "none" or not config.is_dynamic:
    return None

  def loss(routing: Routing, live: Bool[Array, " T"]) -> Float[Array, ""]:
    mask = live if objective.balance_tokens == "all" else response
    if objective.balance == "expert":
      return expert_balance_loss(routing.scores, routing.picks, balance["coefficient"], mask)
    if objective.balance == "adamoe":
      return adamoe_balance_loss(routing.scores, routing.picks, config.num_experts, balance["coefficient"], mask)
    return group_balance_loss(
      routing.scores, routing.picks, config.num_experts, balance["weight"], balance["coefficient"], mask
    )

  return loss


def token_loss(
  objective: Objective, losses: TokenLosses, batch: Mapping[str, Float[Array, " T"]]
) -> Float[Array, " T"]:
  """The distillation loss of each token, in nats; `batch` holds old_logprobs for loss="sampled"."""
  if objective.loss == "cross_entropy":
    return -losses.logprob
  if objective.loss == "forward_kl":
    return losses.forward_kl
  if objective.loss == "reverse_kl":
    return losses.reverse_kl
  old = batch["old_logprobs"]
  return sampled_token_loss(losses.logprob, old, losses.teacher_logprob - old, objective.clip_low, objective.clip_high)


def batch_loss(
  objective: Objective,
  student: Decoder,
  teacher: Decoder,
  batch: Mapping[str, Array],
  balance: Mapping[str, Array],
  response_tokens: Float[Array, ""],
  parts: int = 1,
) -> tuple[Float[Array, ""], dict[str, dict[str, Array]]]:
  """Loss of one (micro-)batch and its metrics.

  Args:
    objective: which losses.
    student: the model in training.
    teacher: the frozen original; it runs with its zero experts masked.
    batch: tokens, targets, loss_mask, segment_ids, positions [B, T] (see data.packing), old_logprobs for "sampled";
      with routing replay also the student's picks while sampling, replay [B, T, L, K], negative where there are none.
    balance: "weight" (w) and "coefficient" (alpha) of the balance loss.
    response_tokens: loss tokens of the whole batch that this may be a part of.
    parts: of how many equal parts of the batch this is one; the losses of all parts add up to the batch's.
  """
  forward = (batch["tokens"], batch["segment_ids"], batch["positions"])
  flat = functools.partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
  mask = flat(batch["loss_mask"]) > 0
  replay = jnp.moveaxis(batch["replay"], 2, 0) if "replay" in batch else None
  out = student.hidden(*forward, aux_loss=aux_loss(objective, student.config, balance, mask), replay=replay)
  teacher_inputs: tuple[Any, ...] = ()
  if objective.needs_teacher:
    masked = teacher.hidden(*forward, zero_expert_bias=-jnp.inf)
    teacher_inputs = (flat(masked.hidden), teacher.head())
  losses = token_losses(
    flat(out.hidden),
    student.head(),
    flat(batch["targets"]),
    *teacher_inputs,
    mask=mask,
    chunk_size=objective.chunk_size,
    sharding=student.config.sharding,
  )
  extra = {"old_logprobs": flat(batch["old_logprobs"])} if objective.loss == "sampled" else {}
  scale = 1.0 / jnp.maximum(response_tokens, 1.0)
  distill = jnp.where(mask, token_loss(objective, losses, extra), 0.0).sum() * scale
  balance_loss = out.aux_loss.sum()
  metrics = _metrics(out, losses, batch, student.config, distill, balance_loss, scale)
  if not objective.needs_teacher:  # what nobody measured is not 0
    del metrics["sums"]["forward_kl"], metrics["sums"]["reverse_kl"]
  return distill + balance_loss / parts, metrics


def _metrics(
  out: HiddenOutput,
  losses: TokenLosses,
  batch: Mapping[str, Array],
  config: Any,
  distill: Array,
  balance_loss: Array,
  scale: Array,
) -> dict[str, dict[str, Array]]:
  """Sums over this part of the batch, scaled so that the parts of a batch add up; ratios are means over parts."""
  real = batch["segment_ids"] > 0
  ratio = functools.partial(zero_expert_ratio, out.picks, config.num_experts)
  return jax.lax.stop_gradient(
    {
      "sums": {
        "loss_distill": distill,
        "cross_entropy": -losses.logprob.sum() * scale,
        "entropy": losses.entropy.sum() * scale,
        "forward_kl": losses.forward_kl.sum() * scale,
        "reverse_kl": losses.reverse_kl.sum() * scale,
        **_sent(out, real.sum(), config),
      },
      "means": {
        "loss_balance": balance_loss,
        "zero_ratio": ratio(mask=real),
        "zero_ratio/response": ratio(mask=batch["loss_mask"] > 0),
        "zero_ratio/layer": ratio(mask=real, axis=(1, 2)),
        **_replaced(out, batch, config),
      },
    }
  )


def _replaced(out: HiddenOutput, batch: Mapping[str, Array], config: Any) -> dict[str, Array]:
  """With routing replay, the share of recorded picks in whose place the routers would now pick other experts."""
  if out.replaced is None:
    return {}
  recorded = (batch["segment_ids"] > 0) & (batch["replay"][:, :, 0, 0] >= 0)
  picks = recorded.sum() * len(out.replaced) * config.num_experts_per_tok
  return {"replay_differs": jnp.where(recorded, out.replaced, 0).sum() / jnp.maximum(picks, 1)}


def _sent(out: HiddenOutput, tokens: Int[Array, ""], config: Any) -> dict[str, Array]:
  """What the student's forward pass sent between the devices of its experts, there and back.

  "sent_static/..." is what a static model sends whose K picks fall evenly on all experts. The backward pass sends
  half as many rows more than that. Rows are counted, not buffers: where XLA lacks a ragged exchange, more is sent
  (see models/expert_parallel.py).
  """
  if out.exchange is None:
    return {}
  devices = config.sharding.expert_devices
  row_bytes = 2 * config.hidden_size * jnp.dtype(config.dtype).itemsize
  rows = out.exchange.rows.astype(jnp.float32).sum()
  static = tokens * len(out.exchange.rows) * config.num_experts_per_tok * (devices - 1.0) / devices
  return {
    "sent/rows": rows,
    "sent/bytes": rows * row_bytes,
    "sent_static/rows": static,
    "sent_static/bytes": static * row_bytes,
  }
