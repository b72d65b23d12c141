import asyncio
import collections
import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeda_jax.data import pipeline, rollouts
from zeda_jax.errors import ZedaError


class Examples:
  """N examples; every token of example i is i + 1, so a batch tells which examples it holds."""

  def __init__(self, lengths):
    self._lengths = np.asarray(lengths, np.int32)

  def __len__(self):
    return len(self._lengths)

  def __getitem__(self, index):
    length = int(self._lengths[index])
    return {"prompt_tokens": [index + 1], "response_tokens": [index + 1] * (length - 1)}

  def lengths(self):
    return self._lengths


def used(batches):
  """How often each example (numbered from 1) comes in the batches."""
  count = collections.Counter()
  for batch in batches:
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
      count.update(int(tokens[segments == s][0]) for s in range(1, segments.max() + 1))
  return count


def same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key])


def glue(parts):
  """Global batches from the batches of each process."""
  return [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]


RUN = st.fixed_dictionaries(
  {
    "batch_size": st.sampled_from([2, 4, 6]),
    "row_length": st.integers(4, 20),
    "seed": st.integers(0, 2**31),
    "epochs": st.integers(1, 3),
  }
)
LENGTHS = st.lists(st.integers(2, 24), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, run=RUN)
def test_every_example_comes_once_an_epoch_and_no_row_is_dropped(lengths, run):
  batches = pipeline.sft_batches(Examples(lengths), **run)
  found = list(batches)
  assert len(found) == batches.num_batches == -(-len(batches.plan) // run["batch_size"])
  assert used(found) == {i + 1: run["epochs"] for i in range(len(lengths))}
  rows = np.concatenate([batch["segment_ids"].any(axis=1) for batch in found])
  assert rows.sum() == len(batches.plan) and rows[: len(batches.plan)].all()  # padding rows only at the very end
  assert {batch["tokens"].shape for batch in found} == {(run["batch_size"], run["row_length"])}
  with pytest.raises(StopIteration):
    next(batches)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, run=RUN, data=st.data())
def test_a_restore_at_any_step_goes_on_exactly(lengths, run, data):
  whole = list(pipeline.sft_batches(Examples(lengths), **run))
  step = data.draw(st.integers(0, len(whole)))
  first = pipeline.sft_batches(Examples(lengths), **run)
  head = list(itertools.islice(first, step))
  state = json.loads(json.dumps(first.get_state()))
  list(itertools.islice(first, data.draw(st.integers(0, 3))))  # work after the save, lost with the killed process
  second = pipeline.sft_batches(Examples(lengths), **run)
  list(itertools.islice(second, data.draw(st.integers(0, 2))))  # a restore into an iterator already in use
  second.set_state(state)
  assert second.step == step
  same(head + list(second), whole)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, run=RUN, data=st.data())
def test_the_global_sequence_does_not_depend_on_the_process_count(lengths, run, data):
  whole = list(pipeline.sft_batches(Examples(lengths), **run))
  before, after = (data.draw(st.sampled_from([p for p in (1, 2, 3) if run["batch_size"] % p == 0])) for _ in range(2))
  step = data.draw(st.integers(0, len(whole)))
  old = [pipeline.sft_batches(Examples(lengths), process_index=p, process_count=before, **run) for p in range(before)]
  heads = [list(itertools.islice(iterator, step)) for iterator in old]
  state = old[-1].get_state()  # of any process
  new = [pipeline.sft_batches(Examples(lengths), process_index=p, process_count=after, **run) for p in range(after)]
  for iterator in new:
    iterator.set_state(state)
  same(glue(heads) + glue([list(iterator) for iterator in new]), whole)


@settings(max_examples=60, deadline=None)
@given(
  num_prompts=st.integers(1, 30),
  batch_size=st.sampled_from([2, 4, 6]),
  seed=st.integers(0, 2**31),
  step=st.integers(0, 12),
  processes=st.sampled_from([1, 2]),
)
def test_prompts_come_once_an_epoch_across_batches_and_restores(num_prompts, batch_size, seed, step, processes):
  steps = 3 * num_prompts // batch_size + 13
  whole = list(itertools.islice(pipeline.prompt_batches(num_prompts, batch_size, seed), steps))
  numbers = np.concatenate(whole).tolist()
  for start in range(0, len(numbers) - num_prompts + 1, num_prompts):
    assert sorted(numbers[start : start + num_prompts]) == list(range(num_prompts))
  first = pipeline.prompt_batches(num_prompts, batch_size, seed)
  head = list(itertools.islice(first, step))
  state = first.get_state()
  rest = []
  for process in range(processes):
    iterator = pipeline.prompt_batches(num_prompts, batch_size, seed, process, processes)
    iterator.set_state(state)
    rest.append(list(itertools.islice(iterator, steps - step)))
  assert np.concatenate(head + [np.concatenate(parts) for parts in zip(*rest, strict=True)]).tolist() == numbers


def test_epochs_and_seeds_give_other_orders():
  def order(seed):
    return np.concatenate(list(itertools.islice(pipeline.prompt_batches(40, 8, seed), 10))).tolist()

  assert order(0)[:40] != order(0)[40:] and order(0) != order(1) and order(0) == order(0)


def test_a_state_of_other_data_is_refused():
  run = {"batch_size": 2, "row_length": 8, "seed": 0}
  iterator = pipeline.sft_batches(Examples([4] * 20), **run)
  next(iterator)
  state = iterator.get_state()
  same_data = pipeline.sft_batches(Examples([4] * 20), **run)
  same_data.set_state(state)
  for lengths, change in (
    ([4] * 19 + [5], {}),
    ([4] * 21, {}),
    ([4] * 20, {"seed": 1}),
    ([4] * 20, {"batch_size": 4}),
    ([4] * 20, {"row_length": 9}),
    ([4] * 20, {"epochs": 2}),
  ):
    other = pipeline.sft_batches(Examples(lengths), **run | change)
    with pytest.raises(ZedaError, match="belongs to other data"):
      other.set_state(state)
  same_data.set_state({"next_index": 5})  # the global step is enough where the caller vouches for the data
  assert next(same_data, None) is None
  with pytest.raises(ZedaError, match="is step 6, but there are 5"):
    same_data.set_state({"next_index": 6})
  with pytest.raises(ZedaError, match="belongs to other data"):
    pipeline.prompt_batches(10, 2, seed=1).set_state(pipeline.prompt_batches(10, 2, seed=0).get_state())


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"row_length": 0}, "row_length is 0"),
    ({"epochs": 0}, "epochs is 0"),
    ({"process_count": 3}, "not a multiple of the 3 processes"),
    ({"process_index": 2, "process_count": 2}, "process_index is 2"),
  ],
)
def test_senseless_settings_are_sentences(change, reason):
  run = {"batch_size": 4, "row_length": 8, "seed": 0} | change
  with pytest.raises(ZedaError, match=reason):
    pipeline.sft_batches(Examples([4]), **run)
  with pytest.raises(ZedaError, match="no rollouts"):
    pipeline.sft_batches(Examples([]), batch_size=1, row_length=8, seed=0)
  with pytest.raises(ZedaError, match="num_prompts is 0"):
    pipeline.prompt_batches(0, 1, 0)


def make_rollouts(directory, count=12):
  for shard in range(2):
    numbers = rollouts.shard_range(shard, 2, count)
    records = (rollouts.make_record({}, i, [i + 1] * (1 + i % 3), [i + 1] * (2 + i % 4)) for i in numbers)
    rollouts.write_shard(directory, shard, 2, records)
  return rollouts.RolloutSource(directory)


def test_worker_processes_give_the_same_batches_and_states(tmp_path):
  run = {"batch_size": 2, "row_length": 8, "seed": 3}
  source = make_rollouts(tmp_path)
  plain = pipeline.sft_batches(source, **run)
  whole = list(plain)
  working = pipeline.sft_batches(source, worker_count=2, **run)
  head = list(itertools.islice(working, 3))
  state = working.get_state()
  working.close()
  assert used(whole) == {i + 1: 1 for i in range(12)}
  resumed = pipeline.sft_batches(source, **run)
  resumed.set_state(state)
  same(head + list(resumed), whole)


def test_a_record_broken_after_the_check_is_named_by_the_pipeline(tmp_path):
  source = make_rollouts(tmp_path)
  batches = pipeline.sft_batches(source, batch_size=2, row_length=8, seed=3)
  path = tmp_path / "rollouts-00001-of-00002.jsonl"
  path.write_text(path.read_text().replace("{", "<"))
  with pytest.raises(ZedaError, match=r"rollouts-00001-of-00002\.jsonl:\d+: broken JSON"):
    list(batches)


def test_orbax_can_save_and_load_the_position(tmp_path):
  """The protocol of orbax's StatefulCheckpointable, which grain's iterators implement."""

  class Ready:
    async def await_creation(self):
      return tmp_path

  def new():
    return pipeline.sft_batches(Examples([4] * 20), batch_size=2, row_length=8, seed=0)

  async def save_and_load(saved, loaded):
    import etils.epath

    await (await saved.save(Ready()))
    await (await loaded.load(etils.epath.Path(tmp_path)))

  first, second = new(), new()
  assert isinstance(first, grain.DatasetIterator)
  head = list(itertools.islice(first, 2))
  asyncio.run(save_and_load(first, second))
  same(head + list(second), list(new()))
