"""What an engine has done, for a progress line or a metrics page."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass
class Statistics:
  """What an engine has done so far, and how full it is.

  Attributes:
    queue: responses that wait for a slot.
    running: responses that have one.
    pages_used: of num_pages.
    prompt_tokens: tokens read in prefills, those of responses that were set back included.
    new_tokens: tokens sampled.
    slot_steps: decode steps times the rows that were decoded, used or not.
    preemptions: how often a response was set back for want of pages.
    prefill_seconds, decode_seconds: wall-clock time, compilation included.
    zero_by_layer: picks of zero experts in each MoE layer.
  """

  num_slots: int
  num_pages: int
  top_k: int
  zero_by_layer: Int[np.ndarray, " L"]
  queue: int = 0
  running: int = 0
  pages_used: int = 0
  prompt_tokens: int = 0
  new_tokens: int = 0
  slot_steps: int = 0
  preemptions: int = 0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0

  @property
  def tokens_per_second(self) -> float:
    return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)

  @property
  def occupancy(self) -> float:
    """Share of the decoded rows in use, over all decode steps."""
    return self.new_tokens / max(self.slot_steps, 1)

  @property
  def zero_ratio_by_layer(self) -> Float[np.ndarray, " L"]:
    return self.zero_by_layer / max((self.prompt_tokens + self.new_tokens) * self.top_k, 1)
