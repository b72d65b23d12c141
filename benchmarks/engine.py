"""The rollout engine beside transformers' batched generate, and what zero experts save while decoding. Random weights.

  python benchmarks/engine.py                      # both tables
  python benchmarks/engine.py --only skipping

`generate`: requests with prompts of 32 to 512 tokens and as many new ones, drawn apart. transformers pads them to one
batch or to several, and decodes each until its longest response is done; batches are in order of arrival, and once more
of like response length, as if that were known beforehand. Only tokens that were asked for count. `skipping`: decode
rate of one model, static and with r_ZE = 0.5, at a shape where experts dominate.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zeda_jax.bench.machine import header, this_machine, threads
from zeda_jax.checkpoint.huggingface import save_hf
from zeda_jax.config import MLAConfig, ModelConfig
from zeda_jax.models.decoder import Decoder, inject
from zeda_jax.models.params import split_model
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.requests import Request

# The ratios of Qwen3-30B-A3B (N = 128, K = 8, F = 3/8 H, N_heads D = 2 H, eight query heads to one of the cache) at a
# sixteenth of its width and a quarter of its depth, with a smaller vocabulary.
SMALL = ModelConfig(
  model_type="qwen3_moe",
  vocab_size=8192,
  hidden_size=128,
  num_heads=8,
  num_kv_heads=1,
  head_dim=32,
  intermediate_size=384,
  moe_intermediate_size=48,
  num_experts=128,
  num_experts_per_tok=8,
  moe_layers=(True,) * 12,
  max_position_embeddings=1024,
)
# The ratios of OLMoE-1B-7B (N = 64, K = 8, F = H / 2, a head of the cache for each of the queries, all 16 layers) at a
# sixteenth of its width, with a smaller vocabulary.
FULL_HEADS = SMALL.replace(
  model_type="olmoe",
  num_heads=4,
  num_kv_heads=4,
  intermediate_size=64,
  moe_intermediate_size=64,
  num_experts=64,
  norm_topk_prob=False,
  qk_norm="projection",
  moe_layers=(True,) * 16,
)
# The ratios of GLM-4.7-Flash (N = 64 and a shared expert, K = 4, F = 3/4 H, 20 heads over a latent of 9/32 H) at
# a sixteenth of its width and a quarter of its depth, with a smaller vocabulary.
LATENT = SMALL.replace(
  model_type="glm4_moe_lite",
  num_heads=20,
  num_kv_heads=20,
  head_dim=16,
  mla=MLAConfig(kv_lora_rank=32, nope_head_dim=12, rope_head_dim=4, v_head_dim=16, q_lora_rank=48),
  intermediate_size=640,
  moe_intermediate_size=96,
  num_experts=64,
  num_experts_per_tok=4,
  num_shared_experts=1,
  moe_layers=(False,) + (True,) * 11,
  scoring="sigmoid",
  routed_scaling_factor=1.8,
  rms_norm_eps=1e-5,
)
SHAPES = {"Qwen3-30B-A3B": SMALL, "GLM-4.7-Flash": LATENT, "OLMoE-1B-7B": FULL_HEADS}
# At half the first one's width.
EXPERTS_DOMINATE = SMALL.replace(
  hidden_size=1024,
  num_heads=8,
  num_kv_heads=2,
  head_dim=64,
  moe_intermediate_size=384,
  moe_layers=(True,) * 2,
)
# (how transformers runs experts, into how many batches the requests are cut, whether these are of like response
# length). grouped_mm is what it takes by itself; "eager" loops over experts, which is slower for small batches.
# batched_mm copies the matrices of every pick: reading 64 prompts of 512 tokens, that would be 13 GB a layer.
BATCHES = (("grouped_mm", 1, False), ("eager", 1, False), ("grouped_mm", 4, False), ("grouped_mm", 4, True))


def random_model(config: ModelConfig, router_std: float = 0.3) -> Decoder:
  """Random weights whose router has preferences."""
  model = Decoder(config, rngs=nnx.Rngs(0))
  for run in model.runs:
    if hasattr(run.mlp, "router"):  # dense layers have none
      run.mlp.router.weight[...] = run.mlp.router.weight[...] * (router_std / 0.02)
  return model


def num_parameters(model: Decoder) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(split_model(model)[1]))


_SORTED = ", like response lengths together"


# --- beside transformers ------------------------------------------------------------------------------------------


def workload(count: int, seed: int = 0) -> list[Request]:
  rng = np.random.default_rng(seed)
  lengths = rng.integers(32, 513, (count, 2)).tolist()
  return [
    Request(rng.integers(0, SMALL.vocab_size, prompt).tolist(), new, temperature=0.0, stop_ids=())
    for prompt, new in lengths
  ]


def load_torch(model: Decoder) -> Any:
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(threads())
  with tempfile.TemporaryDirectory() as scratch:
    path = pathlib.Path(scratch) / "model"
    save_hf(model, path)
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def torch_generate(stock: Any, requests: Sequence[Request], batch_size: int) -> float:
  """Seconds for all requests, in batches."""
  import torch

  start = time.perf_counter()
  for first in range(0, len(requests), batch_size):
    batch = requests[first : first + batch_size]
    width = max(len(r.prompt) for r in batch)
    padding = [width - len(r.prompt) for r in batch]
    tokens = torch.tensor([[0] * n + list(r.prompt) for n, r in zip(padding, batch, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    new = max(r.max_new_tokens for r in batch)
    with torch.no_grad():
      stock.generate(
        tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
      )
  return time.perf_counter() - start


def engine_generate(model: Decoder, requests: Sequence[Request], **sizes: int) -> tuple[float, Engine]:
  engine = Engine(model, **sizes)
  start = time.perf_counter()
  for _ in engine.run(requests):
    pass
  return time.perf_counter() - start, engine


def compare_generate(args: argparse.Namespace) -> list[str]:
  return [line for shape in args.shapes for line in compare_shape(shape, args)]


def compare_shape(shape: str, args: argparse.Namespace) -> list[str]:
  config = SHAPES[shape]
  model = random_model(config)
  requests = workload(args.requests)
  tokens = sum(r.max_new_tokens for r in requests)
  stock = load_torch(model)
  rows: dict[str, float] = {}
  for slots in args.slots:
    engine_generate(model, requests, num_slots=slots, chunk_steps=args.chunk_steps)  # compiles
  for _ in range(args.repeats):
    for slots in args.slots:
      seconds, engine = engine_generate(model, requests, num_slots=slots, chunk_steps=args.chunk_steps)
      name = f"engine, {slots} slots (occupancy {engine.statistics().occupancy:.2f})"
      rows[name] = min(seconds, rows.get(name, np.inf))
    for implementation, parts, sort in BATCHES:
      stock.set_experts_implementation(implementation)
      size = max(1, args.requests // parts)
      name = f"transformers, {implementation}, batches of {size}" + (_SORTED if sort else "")
      ordered = sorted(requests, key=lambda r: r.max_new_tokens) if sort else requests
      rows[name] = min(torch_generate(stock, ordered, size), rows.get(name, np.inf))
      print(f"{shape}: {name}: {rows[name]:.1f} s", flush=True)
  theirs = min(s for name, s in rows.items() if name.startswith("transformers") and _SORTED not in name)
  lines = [
    f"\nThe ratios of {shape}, {num_parameters(model) / 1e6:.1f} M parameters in {config.num_layers} layers, "
    f"N = {config.num_experts}, K = {config.num_experts_per_tok}; {args.requests} requests, {tokens} new tokens, "
    "greedy, float32\n",
    "| | s | tokens/s | of the best of transformers in order of arrival |",
    "|---|---:|---:|---:|",
  ]
  return lines + [f"| {name} | {s:.2f} | {tokens / s:.0f} | {theirs / s:.2f} |" for name, s in rows.items()]


# --- what zero experts save ---------------------------------------------------------------------------------------


def bias_for(model: Decoder, ratio: float) -> float:
  """The zero_expert_bias at which random tokens have this zero-expert ratio."""
  tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (8, 32))
  graphdef, state = nnx.split(model)
  zero = jax.jit(lambda bias: nnx.merge(graphdef, state).hidden(tokens, zero_expert_bias=bias).picks)
  low, high = -20.0, 20.0
  for _ in range(14):
    bias = (low + high) / 2
    share = float((zero(jnp.float32(bias)) >= model.config.num_experts).mean())
    low, high = (bias, high) if share < ratio else (low, bias)
  return (low + high) / 2


def compare_skipping(args: argparse.Namespace) -> list[str]:
  static = random_model(EXPERTS_DOMINATE)
  dynamic = inject(static)
  bias = bias_for(dynamic, 0.5)
  rng = np.random.default_rng(0)
  lines = [
    f"{num_parameters(static) / 1e6:.0f} M parameters, N = {EXPERTS_DOMINATE.num_experts}, "
    f"K = {EXPERTS_DOMINATE.num_experts_per_tok}, float32\n",
    "| slots | static tokens/s | r_ZE | dynamic tokens/s | speed-up |",
    "|---:|---:|---:|---:|---:|",
  ]
  for slots in args.skipping_slots:
    requests = [
      Request(rng.integers(0, 8192, 16).tolist(), 65, temperature=1.0, stop_ids=(), stream=i) for i in range(slots)
    ]
    biased = [dataclasses.replace(request, zero_expert_bias=bias) for request in requests]
    cases: dict[str, tuple[Decoder, list[Request]]] = {"static": (static, requests), "dynamic": (dynamic, biased)}
    best, ratio = dict.fromkeys(cases, 0.0), 0.0
    for _ in range(1 + args.repeats):
      for name, (model, asked) in cases.items():
        _, engine = engine_generate(model, asked, num_slots=slots, max_length=96)
        found = engine.statistics()
        best[name] = max(best[name], found.new_tokens / found.decode_seconds)
        ratio = float(found.zero_ratio_by_layer.mean())
    before, after = best["static"], best["dynamic"]
    lines.append(f"| {slots} | {before:.1f} | {ratio:.2f} | {after:.1f} | {after / before:.2f} |")
  return lines


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
  "generate": compare_generate,
  "skipping": compare_skipping,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", choices=PARTS, help="one of the two tables")
  parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES), help="of the first table")
  parser.add_argument("--requests", type=int, default=64)
  parser.add_argument("--slots", type=int, nargs="+", default=[64])
  parser.add_argument("--chunk-steps", type=int, default=16)
  parser.add_argument("--skipping-slots", type=int, nargs="*", default=[4, 16])
  parser.add_argument("--repeats", type=int, default=1)
  parser.add_argument("--out", type=pathlib.Path, help="also write the tables to this file")
  args = parser.parse_args()
  text = "# Rollout engine\n\n" + header(this_machine("float32"), "float32") + "\n"
  print(text)
  for name, part in PARTS.items():
    if args.only in (None, name):
      table = "\n".join([f"\n## {name}\n", *part(args)]) + "\n"
      print(table, flush=True)
      text += table
  if args.out is not None:
    args.out.write_text(text)


if __name__ == "__main__":
  main()
