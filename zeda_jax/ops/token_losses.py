"""Per-token losses of a language-model head, without ever making the logits of all tokens and all words.

The vocabulary is walked in chunks of columns: one online pass (sums kept relative to a running maximum, as in online
softmax) gives the log-probability of the target, the entropy and both KL divergences to a teacher; the backward pass
makes the same chunks again and uses closed forms. Memory beyond inputs and gradients is a few arrays of
[tokens, chunk], whatever the vocabulary.

On a mesh each device walks the vocabulary for its own tokens. The heads are cut along the hidden dimension: every chunk
of columns is gathered when its turn comes, and its gradient summed over the devices and cut again at once, so that no
device ever holds a whole head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.errors import ZedaError
from zeda_jax.ops import varying
from zeda_jax.sharding import Sharding, gather, sum_and_cut

# One fp32 array of [tokens, chunk] stays below this; with a teacher about six of them are alive at once.
CHUNK_BYTES = 64 * 2**20
MIN_CHUNK = 128  # narrower products waste matrix units

_LOWEST = -1e30  # first running maximum; finite, so that (old maximum - new maximum) * 0 is 0 and not NaN
_MAX_LOG_RATIO = 20.0


class TokenLosses(NamedTuple):
  """One fp32 number per token, in nats. The three that need a teacher are 0 without one."""

  logprob: Float[Array, "T"]  # log pi(target)
  entropy: Float[Array, "T"]  # of the student
  teacher_logprob: Float[Array, "T"]  # log pi_teacher(target); a constant to differentiation
  forward_kl: Float[Array, "T"]  # KL(teacher || student)
  reverse_kl: Float[Array, "T"]  # KL(student || teacher)


class _Sums(NamedTuple):
  """What one pass keeps per token for one model; weights are exp(logit - peak) of the columns seen so far."""

  peak: Float[Array, "T"]
  total: Float[Array, "T"]  # sum of weights
  height: Float[Array, "T"]  # sum of weight * (logit - peak)
  gap: Float[Array, "T"]  # sum of weight * ((teacher logit - teacher peak) - (student logit - student peak))
  target: Float[Array, "T"]  # logit of the target; NaN until its column was seen


_State = tuple[_Sums, _Sums | None]  # student, teacher


class _Stats(NamedTuple):
  """What the backward pass needs besides the inputs."""

  # logsumexp in two parts: subtracting the peak first keeps the digits of log-probabilities near 0.
  peak: Float[Array, "T"]
  log_total: Float[Array, "T"]
  teacher_peak: Float[Array, "T"]
  teacher_log_total: Float[Array, "T"]
  entropy: Float[Array, "T"]
  reverse_kl: Float[Array, "T"]


def default_chunk_size(num_tokens: int, vocab_size: int) -> int:
  """Columns per chunk: CHUNK_BYTES of fp32 for a device's `num_tokens` rows, a multiple of MIN_CHUNK, at most the
  vocabulary."""
  columns = CHUNK_BYTES // (4 * max(num_tokens, 1)) // MIN_CHUNK * MIN_CHUNK
  return min(max(columns, MIN_CHUNK), vocab_size)


def token_losses(
  hidden: Float[Array, "T H"],
  head: Float[Array, "H V"],
  targets: Int[Array, "T"],
  teacher_hidden: Float[Array, "T G"] | None = None,
  teacher_head: Float[Array, "G V"] | None = None,
  *,
  mask: Bool[Array, "T"] | Float[Array, "T"] | None = None,
  chunk_size: int | None = None,
  sharding: Sharding | None = None,
) -> TokenLosses:
  """Log-probability, entropy and KL divergences per token, differentiable in `hidden` and `head`.

  Logits are products in the dtype of the hidden states (the head's columns are cast to it chunk by chunk) accumulated
  in fp32; everything after them is fp32. Student and teacher may differ in dtype and width. Gradients: d_hidden is
  summed in fp32 over the chunks; nothing flows to the teacher. In bf16 the gradient of the logits is rounded to bf16
  before its two products.

  Args:
    hidden: the student's final hidden states (after the last norm).
    head: the student's output projection.
    targets: next-token ids. An id outside the vocabulary gives NaN log-probabilities in a row that is not masked.
    teacher_hidden: the teacher's final hidden states for the same tokens; given together with `teacher_head`.
    teacher_head: the teacher's output projection, over the same vocabulary.
    mask: rows where it is 0 or False give 0 everywhere and a gradient of exactly 0, even if their hidden states or
      targets are garbage or NaN.
    chunk_size: columns per chunk; `default_chunk_size` where None. The result does not depend on it.
    sharding: of the tokens, where they are spread over a mesh that divides their number. Arrays are global.

  Raises:
    ZedaError: a teacher over another vocabulary, only half of a teacher, or a chunk size below 1.
  """
  if (teacher_hidden is None) != (teacher_head is None):
    raise ZedaError("token_losses got only one of teacher_hidden and teacher_head: give both or neither.")
  if teacher_head is not None and teacher_head.shape[1] != head.shape[1]:
    raise ZedaError(
      f"The teacher's vocabulary has {teacher_head.shape[1]} entries and the student's {head.shape[1]}: "
      "both must come from the same tokenizer and embedding size."
    )
  if chunk_size is not None and chunk_size < 1:
    raise ZedaError(f"chunk_size is {chunk_size}; expected at least 1.")
  teacher_hidden, teacher_head = lax.stop_gradient((teacher_hidden, teacher_head))
  run = functools.partial(_on_devices, sharding, chunk_size)
  if mask is None:
    return run(hidden, head, targets, teacher_hidden, teacher_head)
  # Both ends are masked outside the custom gradient: `where` sends exactly 0 back to masked rows, and its zeroed
  # inputs keep 0 * NaN out of the products that sum over rows.
  keep = mask > 0 if mask.dtype != jnp.bool_ else mask
  hidden = jnp.where(keep[:, None], hidden, 0)
  if teacher_hidden is not None:
    teacher_hidden = jnp.where(keep[:, None], teacher_hidden, 0)
  losses = run(hidden, head, targets, teacher_hidden, teacher_head)
  return TokenLosses(*(jnp.where(keep, loss, 0.0) for loss in losses))


def sampled_token_loss(
  logprob: Float[Array, "T"],
  old_logprob: Float[Array, "T"],
  advantage: Float[Array, "T"],
  clip_low: float = 0.2,
  clip_high: float = 0.2,
) -> Float[Array, "T"]:
  """Policy gradient of sampled tokens with ratio clipping (method of PPO), negated so that it is minimised.

  loss = -min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage), ratio = pi(y_t) / pi_old(y_t).
  For on-policy distillation advantage = log pi_teacher(y_t) - log pi_old(y_t) (Section 4 of the paper).
  Gradients flow to `logprob` alone. The log-ratio is limited to +-20, so the ratio stays finite.
  """
  old_logprob, advantage = lax.stop_gradient((old_logprob, advantage))
  ratio = jnp.exp(jnp.clip(logprob - old_logprob, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
  clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  return -jnp.minimum(ratio * advantage, clipped * advantage)


def masked_mean(values: Float[Array, "*S"], mask: Bool[Array, "*S"] | Float[Array, "*S"]) -> Float[Array, ""]:
  """Mean of `values` weighted by `mask`; 0 where the mask is empty. NaN under a zero mask does not count."""
  weights = mask.astype(jnp.float32)
  total = jnp.sum(jnp.where(weights > 0, values, 0.0) * weights)
  count = jnp.sum(weights)
  return total / jnp.where(count > 0, count, 1.0)


class _Walk(NamedTuple):
  """How the vocabulary is walked."""

  columns: int  # of a chunk
  spec: PartitionSpec = PartitionSpec()  # how the rows of the head are spread over a mesh
  teacher_spec: PartitionSpec = PartitionSpec()


def _on_devices(sharding: Sharding | None, chunk_size: int | None, *operands: Any) -> TokenLosses:
  """_losses(...) of each device's own tokens, where they are spread evenly over a mesh."""
  hidden, head, _, _, teacher_head = operands
  devices = 1 if sharding is None or hidden.shape[0] % sharding.num_devices else sharding.num_devices
  columns = chunk_size or default_chunk_size(hidden.shape[0] // devices, head.shape[1])
  walk = _Walk(min(columns, head.shape[1]))
  if sharding is None or devices == 1:
    return _losses(walk, *operands)
  rows = PartitionSpec(sharding.rules.tokens)
  spread = lambda matrix: rows if matrix is not None and matrix.shape[0] % devices == 0 else PartitionSpec()
  walk = walk._replace(spec=spread(head), teacher_spec=spread(teacher_head))

  def on_device(*operands: Any) -> TokenLosses:
    leaves, structure = jax.tree.flatten(operands)
    return _losses(walk, *jax.tree.unflatten(structure, varying.vary_alike(*leaves)))

  in_specs = (rows, walk.spec, rows, *((None, None) if teacher_head is None else (rows, walk.teacher_spec)))
  return jax.shard_map(on_device, mesh=sharding.mesh, in_specs=in_specs, out_specs=rows)(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(walk, hidden, head, targets, teacher_hidden, teacher_head):
  return _forward(walk, hidden, head, targets, teacher_hidden, teacher_head)[0]


def _losses_fwd(walk, hidden, head, targets, teacher_hidden, teacher_head):
  losses, stats = _forward(walk, hidden, head, targets, teacher_hidden, teacher_head)
  return losses, (hidden, head, targets, teacher_hidden, teacher_head, stats)


def _losses_bwd(walk: _Walk, residuals: Any, grads: TokenLosses):
  hidden, head, targets, teacher_hidden, teacher_head, stats = residuals
  matmul_dtype = _gradient_dtype(hidden)

  def body(i, carry):
    d_hidden, d_head = carry
    chunk = _chunk(i, walk.columns, head.shape[1])
    weight = chunk.whole(head, walk.spec)
    logprob = _logits(hidden, weight) - stats.peak[:, None] - stats.log_total[:, None]
    teacher_logprob = None
    if teacher_hidden is not None:
      teacher_logits = _logits(teacher_hidden, chunk.whole(teacher_head, walk.teacher_spec))
      teacher_logprob = teacher_logits - stats.teacher_peak[:, None] - stats.teacher_log_total[:, None]
    d_logits = _logits_gradient(grads, stats, logprob, teacher_logprob, chunk.ids == targets[:, None])
    d_logits = jnp.where(chunk.fresh, d_logits, 0.0).astype(matmul_dtype)
    weight = weight.astype(matmul_dtype)
    d_hidden += lax.dot_general(d_logits, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    d_weight = lax.dot_general(
      hidden.astype(matmul_dtype), d_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    d_weight = sum_and_cut(d_weight, walk.spec)
    # Every column is fresh once, so adding in the head's own dtype rounds each entry once.
    d_weight = chunk.of(d_head) + d_weight.astype(head.dtype)
    return d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_weight, chunk.start, axis=1)

  start = varying.zeros(hidden.shape, jnp.float32, like=hidden), varying.zeros(head.shape, head.dtype, like=head)
  d_hidden, d_head = lax.fori_loop(0, _num_chunks(walk.columns, head.shape[1]), body, start)
  return d_hidden.astype(hidden.dtype), d_head, None, None, None


_losses.defvjp(_losses_fwd, _losses_bwd)


class _Chunk(NamedTuple):
  """Columns start .. start+size; the last chunk is shifted back to fit, and its already-seen columns are not fresh."""

  start: Int[Array, ""]
  ids: Int[Array, "1 C"]
  fresh: Bool[Array, "1 C"]

  def of(self, head: Float[Array, "h V"]) -> Float[Array, "h C"]:
    return lax.dynamic_slice_in_dim(head, self.start, self.ids.shape[1], axis=1)

  def whole(self, head: Float[Array, "h V"], spec: PartitionSpec) -> Float[Array, "H C"]:
    """All rows of these columns, wherever they are."""
    return gather(self.of(head), spec)


def _num_chunks(columns: int, vocab_size: int) -> int:
  return -(-vocab_size // columns)


def _chunk(i: Int[Array, ""], columns: int, vocab_size: int) -> _Chunk:
  start = jnp.minimum(i * columns, vocab_size - columns)
  ids = start + jnp.arange(columns)[None, :]
  return _Chunk(start, ids, ids >= i * columns)


def _logits(hidden: Float[Array, "T H"], weight: Float[Array, "H C"]) -> Float[Array, "T C"]:
  return jnp.dot(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _gradient_dtype(hidden: Float[Array, "T H"]) -> Any:
  # float16 has no range for the gradients of logits (1e-8 and below), bfloat16 has.
  return jnp.bfloat16 if hidden.dtype == jnp.bfloat16 else jnp.float32


def _forward(walk: _Walk, hidden, head, targets, teacher_hidden, teacher_head) -> tuple[TokenLosses, _Stats]:
  def body(i, state):
    chunk = _chunk(i, walk.columns, head.shape[1])
    logits, teacher_logits = _logits(hidden, chunk.whole(head, walk.spec)), None
    if teacher_hidden is not None:
      teacher_logits = _logits(teacher_hidden, chunk.whole(teacher_head, walk.teacher_spec))
    return _accumulate(state, logits, teacher_logits, chunk, targets)

  zeros = varying.zeros(hidden.shape[:1], jnp.float32, like=hidden)
  nothing = _Sums(zeros + _LOWEST, zeros, zeros, zeros, zeros + jnp.nan)
  start = nothing, None if teacher_hidden is None else nothing
  return _finish(*lax.fori_loop(0, _num_chunks(walk.columns, head.shape[1]), body, start))


class _Rise(NamedTuple):
  """One chunk of logits seen from the new running maximum."""

  peak: Float[Array, "T"]
  shift: Float[Array, "T"]  # old peak - new peak: what every earlier (logit - peak) changes by
  height: Float[Array, "T C"]  # logit - peak
  weight: Float[Array, "T C"]  # exp(height), 0 where the column is not fresh

  def sum(self, old_sum, old_total, change, values):
    """Sum of weight * value over all columns so far, when the earlier values each changed by `change`."""
    return jnp.exp(self.shift) * (old_sum + change * old_total) + jnp.sum(self.weight * values, axis=1)


def _rise(old_peak: Float[Array, "T"], logits: Float[Array, "T C"], fresh: Bool[Array, "1 C"]) -> _Rise:
  # Columns seen twice don't change the maximum.
  peak = jnp.maximum(old_peak, jnp.max(logits, axis=1))
  height = logits - peak[:, None]
  return _Rise(peak, old_peak - peak, height, jnp.where(fresh, jnp.exp(height), 0.0))


def _accumulate(state: _State, student_logits, teacher_logits, chunk: _Chunk, targets) -> _State:
  """Adds one chunk of logits [T, C] to both models' sums."""
  student, teacher = state
  rise = _rise(student.peak, student_logits, chunk.fresh)
  if teacher is None:
    return _add(student, rise, student_logits, 0.0, 0.0, chunk, targets), None
  teacher_rise = _rise(teacher.peak, teacher_logits, chunk.fresh)
  # The difference of two near-equal models is taken column by column, before it is summed: KL keeps its digits.
  gap, change = teacher_rise.height - rise.height, teacher_rise.shift - rise.shift
  return (
    _add(student, rise, student_logits, gap, change, chunk, targets),
    _add(teacher, teacher_rise, teacher_logits, gap, change, chunk, targets),
  )


def _add(sums: _Sums, rise: _Rise, logits, gap, gap_change, chunk: _Chunk, targets) -> _Sums:
  seen = (targets >= chunk.start) & (targets < chunk.start + logits.shape[1])
  target = jnp.sum(jnp.where(chunk.ids == targets[:, None], logits, 0.0), axis=1)
  return _Sums(
    peak=rise.peak,
    total=rise.sum(sums.total, sums.total, 0.0, 1.0),
    height=rise.sum(sums.height, sums.total, rise.shift, rise.height),
    gap=rise.sum(sums.gap, sums.total, gap_change, gap),
    target=jnp.where(seen, target, sums.target),
  )


def _finish(student: _Sums, teacher: _Sums | None) -> tuple[TokenLosses, _Stats]:
  log_total = jnp.log(student.total)
  entropy = log_total - student.height / student.total
  logprob = student.target - student.peak - log_total
  zeros = jnp.zeros_like(logprob)
  if teacher is None:
    stats = _Stats(student.peak, log_total, zeros, zeros, entropy, zeros)
    return TokenLosses(logprob, entropy, zeros, zeros, zeros), stats
  teacher_log_total = jnp.log(teacher.total)
  offset = log_total - teacher_log_total
  forward_kl = teacher.gap / teacher.total + offset
  reverse_kl = -student.gap / student.total - offset
  stats = _Stats(student.peak, log_total, teacher.peak, teacher_log_total, entropy, reverse_kl)
  teacher_logprob = teacher.target - teacher.peak - teacher_log_total
  return TokenLosses(logprob, entropy, teacher_logprob, forward_kl, reverse_kl), stats


def _logits_gradient(grads: TokenLosses, stats: _Stats, logprob, teacher_logprob, is_target) -> Float[Array, "T C"]:
  """Closed-form gradient of the weighted losses in the student's logits; log-probabilities are [T, C]."""
  prob = jnp.exp(logprob)
  d_logits = grads.logprob[:, None] * (is_target - prob)
  d_logits -= grads.entropy[:, None] * prob * (logprob + stats.entropy[:, None])
  if teacher_logprob is None:
    return d_logits
  d_logits += grads.forward_kl[:, None] * (prob - jnp.exp(teacher_logprob))
  log_ratio = logprob - teacher_logprob
  return d_logits + grads.reverse_kl[:, None] * prob * (log_ratio - stats.reverse_kl[:, None])
