import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeda_jax.data import rollouts
from zeda_jax.errors import ZedaError


def record(index=0, prompt=(1, 2), response=(3, 4, 5), **changes):
  return {"index": index, "prompt_tokens": list(prompt), "response_tokens": list(response)} | changes


def write(path, *records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


@given(num_prompts=st.integers(1, 300), data=st.data())
def test_shards_part_the_prompts(num_prompts, data):
  num_shards = data.draw(st.integers(1, num_prompts))
  parts = [rollouts.shard_range(shard, num_shards, num_prompts) for shard in range(num_shards)]
  assert [index for part in parts for index in part] == list(range(num_prompts))
  assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shard_that_cannot_be_is_refused():
  for shard, num_shards in ((2, 2), (-1, 2), (0, 6)):
    with pytest.raises(ValueError, match="of"):
      rollouts.shard_range(shard, num_shards, 5)


def test_resume_sees_complete_shards_only(tmp_path):
  assert rollouts.finished_shards(tmp_path / "none", 3) == []

  def interrupted():
    yield record()
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    rollouts.write_shard(tmp_path, 0, 3, interrupted())
  assert rollouts.finished_shards(tmp_path, 3) == []
  path = rollouts.write_shard(tmp_path, 2, 3, (record(i) for i in range(2)))
  rollouts.write_shard(tmp_path, 0, 3, [record()])
  (tmp_path / ".rollouts-00001-of-00003.jsonl.partial").write_text("{")  # what a killed run leaves
  assert path == tmp_path / "rollouts-00002-of-00003.jsonl"
  assert rollouts.finished_shards(tmp_path, 3) == [0, 2]
  with pytest.raises(ZedaError, match="already exists"):
    rollouts.write_shard(tmp_path, 2, 3, [record()])
  with pytest.raises(ZedaError, match="a run with 3 shards, this one has 4"):
    rollouts.finished_shards(tmp_path, 4)
  assert len(rollouts.RolloutSource(tmp_path)) == 3


def test_a_record_comes_back_with_its_prompt_and_exact_logprobs(tmp_path):
  logprobs = np.log(np.random.default_rng(0).random(1000)).astype(np.float32)
  prompt = {"prompt": "x", "label": [1], "id": "a", "index": "the user's own"}
  made = rollouts.make_record(prompt, np.int64(7), np.arange(3), np.arange(1000), logprobs, 1, np.float32(0.5), False)
  path = rollouts.write_shard(tmp_path, 0, 1, [made])
  read = rollouts.RolloutSource(path)[0]
  np.testing.assert_array_equal(read["logprobs"], logprobs)
  assert read["logprobs"].dtype == np.float32 and read["prompt_tokens"].dtype == np.int32
  assert read["response_tokens"].tolist() == list(range(1000))
  rest = {k: v for k, v in read.items() if k not in ("logprobs", "prompt_tokens", "response_tokens")}
  expected = {"prompt": "x", "label": [1], "id": "a", "index": 7, "sample": 1, "zero_ratio": 0.5, "finished": False}
  assert rest == expected
  assert len(path.read_bytes()) < 1000 * (4 + 14)  # fp32 decimals, not those of a double


def test_lengths_and_pickling(tmp_path):
  path = write(tmp_path / "r.jsonl", record(), record(prompt=[1], response=[2]), record(prompt=[1] * 9))
  source = rollouts.RolloutSource(path)
  assert source.lengths().tolist() == [5, 2, 12] and source.lengths().dtype == np.int32
  copy = pickle.loads(pickle.dumps(source))
  assert copy.lengths().tolist() == [5, 2, 12] and copy[np.int64(1)]["response_tokens"].tolist() == [2]


@pytest.mark.parametrize(
  ("bad", "reason"),
  [
    (record(prompt=[]), "'prompt_tokens' is wrong"),
    (record(response=[1, "x"]), "'response_tokens' is wrong"),
    (record(response=[1, 2.5]), "'response_tokens' is wrong"),
    (record(response=[True]), "'response_tokens' is wrong"),
    (record(response=[-1]), "'response_tokens' is wrong"),
    (record(response=[[1]]), "'response_tokens' is wrong"),
    (record(response=[1, [2]]), "'response_tokens' is wrong"),
    (record(response=[2**40]), "'response_tokens' is wrong"),
    ({"prompt_tokens": [1]}, "'response_tokens' is missing"),
    (record(logprobs=[0.1]), "'logprobs' is wrong; expected a list of 3 numbers"),
    (record(logprobs="x"), "'logprobs' is wrong"),
  ],
)
def test_a_bad_rollout_is_named(tmp_path, bad, reason):
  path = write(tmp_path / "r.jsonl", record(), bad)
  source = rollouts.RolloutSource(path)
  for read in (source.lengths, lambda: source[1]):
    with pytest.raises(ZedaError) as error:
      read()
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)


def test_tokens_of_another_vocabulary_are_named(tmp_path):
  source = rollouts.RolloutSource(write(tmp_path / "r.jsonl", record(), record(response=[99])))
  assert source.lengths(vocab_size=100).tolist() == [5, 3]
  with pytest.raises(ZedaError, match=r"r\.jsonl:2: token id 99 is not below vocab_size 99"):
    source.lengths(vocab_size=99)


# The whole way of a training run over the data, in a process of its own whose peak memory can be asked for.
MEMORY = """
import resource, sys
from zeda_jax.data import pipeline, rollouts
kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = rollouts.RolloutSource(sys.argv[1])
source[0]
before = kib()
batches = pipeline.sft_batches(source, batch_size=4, row_length=16384, seed=0)
tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
print(tokens, (kib() - before) * 1024)
"""


def test_a_large_file_is_never_in_memory(tmp_path):
  count, length = 2000, 8192
  rng = np.random.default_rng(0)
  variants = [rng.integers(100_000, 150_000, length).tolist() for _ in range(4)]
  lines = [json.dumps(record(response=tokens)).encode() + b"\n" for tokens in variants]
  with open(tmp_path / "r.jsonl", "wb") as stream:
    for i in range(count):
      stream.write(lines[i % len(lines)])
  size = os.path.getsize(tmp_path / "r.jsonl")
  root = pathlib.Path(__file__).parents[2]
  run = subprocess.run(
    [sys.executable, "-c", MEMORY, str(tmp_path / "r.jsonl")],
    env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  tokens, peak = map(int, run.stdout.split())
  assert tokens == count * (length + 2)
  assert size > 100e6 and peak < size / 4, (size, peak)
