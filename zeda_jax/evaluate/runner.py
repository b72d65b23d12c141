"""Evaluation of one model on prompts: accuracy per family, expert work done, distance to the teacher."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zeda_jax.data.packing import pack_row, plan_rows
from zeda_jax.distributed import on_mesh, spread_rows, to_host
from zeda_jax.evaluate.graders import GRADERS
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import merge_model, split_model
from zeda_jax.ops.token_losses import token_losses
from zeda_jax.rollout.generate import Sample, generate


@dataclasses.dataclass(frozen=True)
class Result:
  """One row of the table. Ratios are shares of the teacher's picks that were not executed, weighted by token."""

  accuracy: Mapping[str, float]  # by family; empty where no record has a label
  num_graded: Mapping[str, int]
  skipped: float  # over all forward passes, prompt included
  skipped_response: float  # over the passes that predicted response tokens
  expert_flops_left: float  # share of the teacher's expert FLOPs
  response_length: float  # mean tokens
  seconds: float  # of generation, without compilation where there was more than one batch

  @property
  def average(self) -> float:
    """Mean of the families' accuracies; NaN where nothing was graded."""
    return float(np.mean(list(self.accuracy.values()))) if self.accuracy else math.nan

  @property
  def standard_error(self) -> float:
    """Of `average`, from the binomial error of each family."""
    if not self.accuracy:
      return math.nan
    variances = [p * (1 - p) / self.num_graded[name] for name, p in self.accuracy.items()]
    return math.sqrt(sum(variances)) / len(variances)


def evaluate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  records: Sequence[Mapping[str, Any]],
  decode: Callable[[Sequence[int]], str],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  batch_size: int = 64,
  zero_expert_bias: float = 0.0,
  grader: str = "exact",
  teacher_top_k: int | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[Result, list[Sample]]:
  """Generates a response to each prompt and grades those whose record has a label.

  Args:
    model: any decoder, baselines included.
    prompts: token ids of each prompt.
    records: beside each prompt; "label" is the right answer, "family" the column it counts in ("all" if missing).
    decode: token ids -> text, without special tokens.
    teacher_top_k: picks per token of the teacher; the model's own by default.
    grader: a name in graders.GRADERS.

  The other arguments are those of `generate`.
  """
  stamps = [(0, time.perf_counter())]

  def note(done: int, total: int) -> None:
    if done - stamps[-1][0] >= batch_size or done == total:
      stamps.append((done, time.perf_counter()))
    if progress is not None:
      progress(done, total)

  samples = generate(
    model,
    prompts,
    max_new_tokens,
    temperature,
    top_k,
    top_p,
    seed,
    batch_size=batch_size,
    zero_expert_bias=zero_expert_bias,
    progress=note,
  )
  right: dict[str, list[bool]] = {}
  for record, sample in zip(records, samples, strict=True):
    if record.get("label") is not None:
      text = decode(sample.tokens)
      right.setdefault(str(record.get("family", "all")), []).append(GRADERS[grader](text, record["label"]))
  executed = model.config.num_experts_per_tok / (teacher_top_k or model.config.num_experts_per_tok)
  responses = np.array([len(s.tokens) for s in samples], np.float64)
  passes = responses + np.array([len(p) for p in prompts]) - 1

  def skipped(ratios: Sequence[float], weights: np.ndarray) -> float:
    return 1 - executed * (1 - float(np.average(ratios, weights=weights)))

  overall = skipped([s.zero_ratio_all for s in samples], passes)
  result = Result(
    accuracy={name: float(np.mean(values)) for name, values in sorted(right.items())},
    num_graded={name: len(values) for name, values in right.items()},
    skipped=overall,
    skipped_response=skipped([s.zero_ratio for s in samples], np.maximum(responses, 1e-9)),
    expert_flops_left=1 - overall,
    response_length=float(responses.mean()),
    seconds=_steady_seconds(stamps),
  )
  return result, samples


def _steady_seconds(stamps: Sequence[tuple[int, float]]) -> float:
  """Time of all prompts at the pace after the first ones, which may have compiled; all there is for one batch."""
  (first, begin), (total, end) = stamps[1] if len(stamps) > 2 else stamps[0], stamps[-1]
  return (end - begin) * total / (total - first)


def teacher_distance(
  student: Decoder,
  teacher: Decoder,
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[int]],
  batch_size: int = 8,
) -> dict[str, float]:
  """KL divergences between the two models per response token, in nats, on given responses (the teacher's, say).

  On a mesh, a batch has at least a row for each device. Where there are several processes, all must call this with the
  same arguments.

  Returns:
    "forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher), "cross_entropy" of the responses.
  """
  examples = [{"prompt_tokens": p, "response_tokens": r} for p, r in zip(prompts, responses, strict=True)]
  lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], np.int32)
  row_length = -(-max(int(lengths.max()), 128) // 128) * 128
  plan = plan_rows(lengths, row_length, seed=0, epoch=0)
  rows = [pack_row([examples[i] for i in plan[r]], row_length) for r in range(len(plan))]
  sharding = student.config.sharding
  if sharding is not None:
    batch_size = -(-batch_size // sharding.num_devices) * sharding.num_devices
  rows += [pack_row([], row_length)] * (-len(rows) % batch_size)
  student_parts, teacher_parts = split_model(student), split_model(teacher)
  distances = jax.jit(_distances, static_argnums=(0, 2))
  total, tokens = np.zeros(3), 0.0
  for first in range(0, len(rows), batch_size):
    batch = {name: np.stack([row[name] for row in rows[first : first + batch_size]]) for name in rows[0]}
    tokens += float(batch["loss_mask"].sum())
    with on_mesh(sharding):
      placed = batch if sharding is None else spread_rows(batch, sharding)
      total += to_host(distances(*student_parts, *teacher_parts, placed))
  names = ("forward_kl", "reverse_kl", "cross_entropy")
  return dict(zip(names, (total / max(tokens, 1.0)).tolist(), strict=True))


def _distances(student_graphdef, student_params, teacher_graphdef, teacher_params, batch):
  student = merge_model(student_graphdef, student_params)
  teacher = merge_model(teacher_graphdef, teacher_params)
  forward = (batch["tokens"], batch["segment_ids"], batch["positions"])
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  losses = token_losses(
    flat(student.hidden(*forward).hidden),
    student.head(),
    flat(batch["targets"]),
    flat(teacher.hidden(*forward, zero_expert_bias=-jnp.inf).hidden),
    teacher.head(),
    mask=flat(batch["loss_mask"]) > 0,
    sharding=student.config.sharding,
  )
  return jnp.stack([losses.forward_kl.sum(), losses.reverse_kl.sum(), -losses.logprob.sum()])
