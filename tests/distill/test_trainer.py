"""The training loop on a toy model; run as a script it trains, for the tests that kill and signal a real process."""

import argparse
import csv
import functools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zeda_jax.checkpoint.orbax import CheckpointStore
from zeda_jax.distill.metrics import MetricWriter
from zeda_jax.distill.optimizer import OptimizerConfig, make_optimizer
from zeda_jax.distill.trainer import StoppedEarly, run_training
from zeda_jax.errors import ZedaError

SIZE, BATCH, STEPS = 256, 4, 24
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.01), STEPS)


@jax.jit
def initial_state():
  params = {"kernel": jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / 16, "scale": jnp.ones(SIZE, jnp.bfloat16)}
  return {"params": params, "opt": OPTIMIZER.init(params), "step": jnp.int32(0), "key": jax.random.key(7)}


@functools.cache
def step_with_nan_at(nan_step=-1, where="loss"):
  """A jitted, donating step with noise from the state's key; loss or one parameter turns NaN in `nan_step`."""

  def loss_fn(params, x, noise):
    return jnp.mean((jnp.tanh(x @ params["kernel"]) * params["scale"].astype(jnp.float32) - x + 0.1 * noise) ** 2)

  def step_fn(state, batch):
    key, noise_key = jax.random.split(state["key"])
    noise = jax.random.normal(noise_key, batch["x"].shape)
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch["x"], noise)
    updates, opt = OPTIMIZER.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    bad = jnp.where(state["step"] + 1 == nan_step, jnp.nan, 1.0)
    if where == "loss":
      loss = loss * bad
    elif where == "params":
      params["kernel"] = params["kernel"] * bad
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "tokens": batch["x"].size, "index": batch["index"]}
    return {"params": params, "opt": opt, "step": state["step"] + 1, "key": key}, metrics

  return jax.jit(step_fn, donate_argnums=0)


def batches():
  def example(index):
    return {"index": np.int32(index), "x": np.random.default_rng(index).normal(size=SIZE).astype(np.float32)}

  return iter(grain.MapDataset.range(BATCH * STEPS).shuffle(seed=3).map(example).batch(BATCH).to_iter_dataset())


def train(directory, *, num_steps=STEPS, save_every=2, step_fn=None, pause=0.0, **options):
  def slowly(batch):
    time.sleep(pause)
    return batch

  with CheckpointStore(directory / "checkpoints") as store:
    return run_training(
      state=initial_state(),
      step_fn=step_fn or step_with_nan_at(),
      batches=batches(),
      num_steps=num_steps,
      store=store,
      save_every=save_every,
      writer=MetricWriter(directory, tensorboard=False),
      prepare=slowly,
      **options,
    )


def as_bytes(state):
  plain = {**state, "key": jax.random.key_data(state["key"])}
  return {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in jax.tree_util.tree_leaves_with_path(plain)}


def rows(directory):
  with (directory / "metrics.csv").open(newline="") as file:
    found = list(csv.DictReader(file))
  return [{k: v for k, v in row.items() if k not in ("step_seconds", "tokens_per_second")} for row in found]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  directory = tmp_path_factory.mktemp("uninterrupted")
  return directory, train(directory)


def start_process(directory, *arguments):
  command = [sys.executable, __file__, str(directory), *map(str, arguments)]
  repository = str(pathlib.Path(__file__).parents[2])
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": repository}
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_rows(process, directory, count, seconds=120):
  """Waits until metrics.jsonl has `count` rows of this process's making or later; False if it ended before."""
  deadline = time.monotonic() + seconds
  while process.poll() is None:
    lines = (directory / "metrics.jsonl").read_text().splitlines() if (directory / "metrics.jsonl").exists() else []
    if len(lines) >= count:
      return True
    assert time.monotonic() < deadline, "the process made no progress"
    time.sleep(0.002)
  return False


def test_killed_at_random_moments_it_ends_bit_identical(tmp_path, uninterrupted):
  expected_directory, expected = uninterrupted
  choose = random.Random(os.urandom(8))
  kills = 0
  final = tmp_path / "final.npz"
  while not final.exists():
    saved = [int(path.name) for path in (tmp_path / "checkpoints").glob("*") if path.name.isdigit()]
    before = max(saved, default=0)
    process = start_process(tmp_path, "--pause", 0.04, "--final", final)
    # At least two steps beyond the last checkpoint, so that the run gets on; then anywhere within a few saves.
    if kills < 4 and wait_for_rows(process, tmp_path, before + 2):
      time.sleep(choose.uniform(0, 0.2))
      process.kill()
      kills += process.wait() == -signal.SIGKILL
    output = process.communicate()[0]
    assert process.returncode in (0, -signal.SIGKILL), output
  assert kills >= 2
  with np.load(final) as found:
    assert {name: found[name].tobytes() for name in found} == as_bytes(expected)
  assert rows(tmp_path) == rows(expected_directory)
  assert [row["step"] for row in rows(tmp_path)] == [str(step + 1) for step in range(STEPS)]
  used = [int(value) for row in rows(tmp_path) for name, value in row.items() if name.startswith("index_")]
  assert sorted(used) == list(range(BATCH * STEPS))  # no example lost or used twice
  jsonl = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in jsonl] == list(range(1, STEPS + 1))


def test_sigterm_saves_and_exits_0(tmp_path, uninterrupted):
  process = start_process(tmp_path, "--pause", 0.05, "--save-every", 1000)
  assert wait_for_rows(process, tmp_path, 3)
  process.terminate()
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 0, output
  stopped = re.search(r"stopped after step (\d+) of 24, saved in (\S+); run the same command again", output)
  assert stopped, output
  step, saved = int(stopped[1]), pathlib.Path(stopped[2])
  assert 3 <= step < STEPS
  assert saved == tmp_path / "checkpoints" / str(step)
  assert saved.is_dir()
  assert len(rows(tmp_path)) == step
  assert as_bytes(train(tmp_path)) == as_bytes(uninterrupted[1])  # and goes on from there


def test_first_ctrl_c_saves_and_the_second_interrupts(tmp_path):
  def interrupt_in_steps(*steps):
    def make_batch(state, raw, step):
      if step in steps:
        for _ in range(steps.count(step)):
          os.kill(os.getpid(), signal.SIGINT)
      return raw

    return make_batch

  handler = signal.getsignal(signal.SIGINT)
  with pytest.raises(StoppedEarly) as stopped:
    train(tmp_path, save_every=100, make_batch=interrupt_in_steps(2))
  assert stopped.value.step == 3
  assert (tmp_path / "checkpoints" / "3").is_dir()
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path, save_every=100, make_batch=interrupt_in_steps(5, 5))
  assert signal.getsignal(signal.SIGINT) == handler
  assert not (tmp_path / "checkpoints" / "6").exists()


@pytest.mark.parametrize(("where", "quantity"), [("loss", "loss became nan"), ("params", "params.kernel became not")])
def test_nan_stops_and_the_last_good_checkpoint_stays(tmp_path, where, quantity):
  good = train(tmp_path / "good", num_steps=8)
  with pytest.raises(ZedaError, match=quantity) as error:
    train(tmp_path / "bad", save_every=4, step_fn=step_with_nan_at(12, where))
  assert "in step 12 of training" in str(error.value)
  assert f"the last good checkpoint is {tmp_path / 'bad' / 'checkpoints' / '8'}" in str(error.value)
  with CheckpointStore(tmp_path / "bad" / "checkpoints") as store:
    assert store.latest_step() == 8
    assert as_bytes(store.restore(initial_state()).state) == as_bytes(good)
  assert rows(tmp_path / "bad")[-1]["step"] == ("11" if where == "loss" else "12")


def test_nan_before_the_first_checkpoint_says_so(tmp_path):
  with pytest.raises(ZedaError, match=r"loss became nan in step 1 .*no checkpoint was saved yet"):
    train(tmp_path, save_every=100, step_fn=step_with_nan_at(1))


def test_nan_may_be_allowed(tmp_path):
  state = train(tmp_path, step_fn=step_with_nan_at(3), num_steps=5, abort_on_nonfinite=False)
  assert int(state["step"]) == 5
  assert rows(tmp_path)[2]["loss"] == "nan"


def test_finished_run_is_only_restored(tmp_path):
  expected = as_bytes(train(tmp_path, num_steps=4))

  def never(state, batch):
    raise AssertionError("no step is left")

  assert as_bytes(train(tmp_path, num_steps=4, step_fn=never)) == expected
  with pytest.raises(ZedaError, match="checkpoint of step 4, but training is configured for 3 steps"):
    train(tmp_path, num_steps=3)


def test_run_can_be_prolonged_and_rows_thinned(tmp_path):
  train(tmp_path, num_steps=4, log_every=3)
  train(tmp_path, num_steps=8, log_every=3)
  assert [row["step"] for row in rows(tmp_path)] == ["1", "3", "4", "6", "8"]


def test_make_batch_sees_state_and_step(tmp_path):
  seen = []

  def make_batch(state, raw, step):
    seen.append((step, int(state["step"])))
    return {**raw, "x": raw["x"] * 0}

  train(tmp_path, num_steps=3, make_batch=make_batch)
  assert seen == [(0, 0), (1, 1), (2, 2)]


def test_data_that_ends_too_early_is_an_error(tmp_path):
  with pytest.raises(ZedaError, match=f"ended after {STEPS} of {STEPS + 1} steps"):
    train(tmp_path, num_steps=STEPS + 1, save_every=100)


def test_times_are_wall_clock(tmp_path):
  began = time.perf_counter()
  train(tmp_path, num_steps=6, save_every=100, pause=0.05, log_every=2)
  total = time.perf_counter() - began
  found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  steps = np.diff([0, *(row["step"] for row in found)])
  seconds = np.array([row["step_seconds"] for row in found])
  # From the start to any row; between two rows it may be less, where the first one's end was seen late.
  assert (np.cumsum(steps * seconds) >= 0.05 * np.cumsum(steps)).all()
  assert (steps * seconds).sum() <= total
  rates = [row["tokens_per_second"] for row in found]
  np.testing.assert_allclose(rates, BATCH * SIZE / seconds, rtol=1e-6)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("directory", type=pathlib.Path)
  parser.add_argument("--pause", type=float, default=0.0)
  parser.add_argument("--save-every", type=int, default=2)
  parser.add_argument("--final", type=pathlib.Path)
  arguments = parser.parse_args()
  try:
    state = train(arguments.directory, pause=arguments.pause, save_every=arguments.save_every)
  except StoppedEarly as stopped:
    print(stopped)
    return
  if arguments.final:
    plain = {**state, "key": jax.random.key_data(state["key"])}
    arrays = {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(plain)}
    with arguments.final.with_suffix(".tmp").open("wb") as file:
      np.savez(file, **{k: a.view(np.uint16) if a.dtype == jnp.bfloat16 else a for k, a in arrays.items()})
    arguments.final.with_suffix(".tmp").rename(arguments.final)


if __name__ == "__main__":
  main()
