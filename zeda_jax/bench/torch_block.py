"""The peer of the whole layer: transformers' Qwen3 MoE block on PyTorch, on the CPU, with our weights and threads."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from zeda_jax.bench.inputs import Layer
from zeda_jax.bench.machine import free_bytes

# column -> how transformers runs the experts: a loop over them, or its grouped product
TORCH = {"torch-eager": "eager", "torch-grouped_mm": "grouped_mm"}


def missing(platform: str) -> str:
  """Why the block cannot be measured here; "" if it can."""
  if platform != "cpu":
    return "is compared on the CPU only"
  if importlib.util.find_spec("torch") is None:
    return "PyTorch is not installed (pip install torch)"
  return ""


def torch_block(layer: Layer, threads: int, copies: int) -> Any:
  """The block with the layer's weights, without its zero experts; or why there is not enough memory, as str.

  Args:
    layer: whose weights are copied, for PyTorch lays them out transposed.
    threads: PyTorch is set to.
    copies: of the weights that will be needed: 1, or 2 with gradients.
  """
  import torch
  from transformers import Qwen3MoeConfig
  from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

  shape, weights = layer.shape, layer.params["experts"]
  needed = copies * (weights["gate_up"].nbytes + weights["down"].nbytes)
  if needed > free_bytes():
    return f"skipped: needs {needed / 1e9:.1f} GB, {free_bytes() / 1e9:.1f} GB are free"
  torch.set_num_threads(threads)
  config = Qwen3MoeConfig(
    hidden_size=shape.hidden,
    moe_intermediate_size=shape.inner,
    num_experts=shape.experts,
    num_experts_per_tok=shape.top_k,
    norm_topk_prob=True,
  )
  with torch.device("meta"):
    block = Qwen3MoeSparseMoeBlock(config)
  values = {
    "gate.weight": layer.params["router"]["weight"],
    "experts.gate_up_proj": np.swapaxes(weights["gate_up"], 1, 2),
    "experts.down_proj": np.swapaxes(weights["down"], 1, 2),
  }
  block.load_state_dict({name: to_torch(value) for name, value in values.items()}, assign=True)
  return block


def to_torch(array: Any) -> Any:
  """A contiguous tensor of the same type."""
  import torch

  value = np.asarray(array)
  if value.dtype == np.float32:
    return torch.from_numpy(np.array(value, order="C"))
  return torch.from_numpy(np.array(value.astype(np.float32), order="C")).to(torch.bfloat16)


def forward(block: Any, experts: str, x: Any) -> Callable[[], tuple[Any, ...]]:
  """A function that runs the block on x [T, H] and returns (out [T, H],) as numpy."""
  import torch

  def call() -> tuple[Any, ...]:
    block.experts.config._experts_implementation = experts
    with torch.no_grad():
      return (block(x[None])[0].float().numpy(),)

  return call


def forward_backward(block: Any, experts: str, x: Any, grad: Any) -> Callable[[], tuple[Any, ...]]:
  """The same with gradients of x and of every weight: (out [T, H], gradient of x [T, H])."""
  inputs = x.clone().requires_grad_()

  def call() -> tuple[Any, ...]:
    block.experts.config._experts_implementation = experts
    block.zero_grad(set_to_none=True)
    inputs.grad = None
    out = block(inputs[None])[0]
    out.backward(grad)
    return out.detach().float().numpy(), inputs.grad.float().numpy()

  return call
