"""The engine with what only a server asks of it."""

import dataclasses

import numpy as np

from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import merge_model
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.requests import Completion
from zeda_jax.rollout.statistics import Statistics


class ServingEngine(Engine):
  """Ends single responses early, and says how long one may be."""

  @property
  def longest(self) -> int:
    """Tokens, prompt and response together, that one sequence can have."""
    scheduler = self._scheduler
    return min(self.max_length, scheduler.pools[0].num_pages * scheduler.page_size + 1)

  @property
  def page_size(self) -> int:
    return self._scheduler.page_size

  @property
  def num_slots(self) -> int:
    return len(self._scheduler.slots)

  @property
  def model(self) -> Decoder:
    """The model with the very arrays that the engine uses, wherever it has put them."""
    assert self._params is not None
    return merge_model(self._graphdef, self._params)

  def forget_statistics(self) -> None:
    """Counts from zero, as after a warm-up."""
    found = self._statistics
    self._statistics = Statistics(found.num_slots, found.num_pages, found.top_k, np.zeros_like(found.zero_by_layer))
    self._scheduler.preemptions = 0

  def finish(self, id: int, index: int) -> Completion | None:
    """Ends one response that has tokens, frees what it holds, and gives what it has; None if it is not known."""
    scheduler = self._scheduler
    for response in (*scheduler.running, *scheduler.waiting):
      if (response.id, response.index) == (id, index) and response.tokens:
        break
    else:
      return None
    if response.slot >= 0:
      scheduler.finish(response)
    else:
      scheduler.waiting.remove(response)
    return dataclasses.replace(self._completion(response), finish_reason="stop")
