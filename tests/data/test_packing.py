import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeda_jax.data import packing

LENGTHS = st.lists(st.integers(1, 30), max_size=60)


@settings(max_examples=200, deadline=None)
@given(
  lengths=LENGTHS,
  row_length=st.integers(1, 25),
  seed=st.integers(0, 2**32 - 1),
  epoch=st.integers(0, 5),
  open_rows=st.integers(1, 8),
)
def test_each_example_is_in_exactly_one_row_that_holds_it(lengths, row_length, seed, epoch, open_rows):
  plan = packing.plan_rows(lengths, row_length, seed, epoch, open_rows)
  rows = [plan[row].tolist() for row in range(len(plan))]
  assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
  for row in rows:
    assert row
    assert sum(lengths[example] for example in row) <= row_length or len(row) == 1
  assert plan.num_truncated == sum(length > row_length for length in lengths)
  assert plan.num_tokens == sum(min(length, row_length) for length in lengths)
  again = packing.plan_rows(np.asarray(lengths, np.int32), row_length, seed, epoch, open_rows)
  assert rows == [again[row].tolist() for row in range(len(again))]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_length=st.integers(1, 25))
def test_with_every_row_open_it_is_first_fit(lengths, row_length):
  """First fit leaves at most one row half empty or less: two of them would have been one."""
  plan = packing.plan_rows(lengths, row_length, seed=0, open_rows=len(lengths) + 1)
  fill = [sum(min(lengths[example], row_length) for example in plan[row]) for row in range(len(plan))]
  assert sum(2 * tokens <= row_length for tokens in fill) <= 1


def test_epochs_and_seeds_shuffle_differently():
  plans = [packing.plan_rows([1] * 50, 5, seed, epoch).examples.tolist() for seed in (0, 1) for epoch in (0, 1)]
  assert len({tuple(plan) for plan in plans}) == 4


def test_rows_are_full_from_first_to_last():
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(8.5, 0.8, 60_000).astype(int), 1, 32768)
  plan = packing.plan_rows(lengths, 32768, seed=0)
  assert plan.num_tokens / (len(plan) * 32768) > 0.98
  tokens = [int(lengths[plan[row]].sum()) for row in range(len(plan))]
  first, last = np.mean(tokens[: len(plan) // 2]), np.mean(tokens[len(plan) // 2 :])
  assert abs(first - last) < 0.02 * 32768  # the emptier rows are not all at the end


def test_joined_plans_are_one_after_the_other():
  plans = [packing.plan_rows([3, 4, 9, 1], 5, seed=0, epoch=epoch) for epoch in range(3)]
  joined = packing.join_plans(plans)
  assert [joined[r].tolist() for r in range(len(joined))] == [p[r].tolist() for p in plans for r in range(len(p))]
  assert (joined.num_truncated, joined.num_tokens) == (3, 3 * 13)


@pytest.mark.parametrize("lengths, row_length, open_rows", [([0], 4, 1), ([1], 0, 1), ([1], 4, 0)])
def test_senseless_arguments_are_refused(lengths, row_length, open_rows):
  with pytest.raises(ValueError, match="at least 1"):
    packing.plan_rows(lengths, row_length, 0, 0, open_rows)


TOKENS = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(TOKENS, TOKENS), max_size=4), slack=st.integers(0, 9))
def test_packed_examples_come_out_again(pairs, slack):
  row_length = max(1, sum(len(p) + len(r) for p, r in pairs) + slack)
  row = packing.pack_row([{"prompt_tokens": p, "response_tokens": r} for p, r in pairs], row_length)
  assert {key: value.dtype for key, value in row.items()} == {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_mask": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
  }
  assert all(value.shape == (row_length,) for value in row.values())
  for segment, (prompt, response) in enumerate(pairs, start=1):
    mine = row["segment_ids"] == segment
    assert row["tokens"][mine].tolist() == prompt + response
    assert row["targets"][mine].tolist() == [*(prompt + response)[1:], 0]
    assert row["positions"][mine].tolist() == list(range(len(prompt + response)))
    assert row["targets"][mine & (row["loss_mask"] == 1)].tolist() == response
  padding = row["segment_ids"] == 0
  assert padding.sum() == row_length - sum(len(p) + len(r) for p, r in pairs)
  assert not any(value[padding].any() for value in row.values())
  assert row["loss_mask"].sum() == sum(len(r) for _, r in pairs)


def test_one_row_by_hand():
  examples = [
    {"prompt_tokens": [5, 6], "response_tokens": [7, 8]},
    {"prompt_tokens": [9], "response_tokens": [2]},
  ]
  row = packing.pack_row(examples, 8)
  assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 2, 0, 0]
  assert row["targets"].tolist() == [6, 7, 8, 0, 2, 0, 0, 0]
  assert row["loss_mask"].tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
  assert row["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
  assert row["positions"].tolist() == [0, 1, 2, 3, 0, 1, 0, 0]


def test_a_long_example_loses_its_end_and_two_do_not_share_what_is_too_short():
  example = {"prompt_tokens": [1, 2], "response_tokens": [3, 4, 5]}
  row = packing.pack_row([example], 4)
  assert row["tokens"].tolist() == [1, 2, 3, 4]
  assert row["targets"].tolist() == [2, 3, 4, 0]
  assert row["loss_mask"].tolist() == [0, 1, 1, 0]
  assert packing.pack_row([{"prompt_tokens": [1, 2, 3, 4, 5], "response_tokens": [6]}], 4)["loss_mask"].sum() == 0
  with pytest.raises(ValueError, match="more than the 9"):
    packing.pack_row([example, example], 9)
