"""A small training on a mesh, as a command of the command line: what the tests of several processes start.

python tests/distributed/worker.py DIRECTORY --mesh=2x2 [--steps=…] …
"""

import argparse
import pathlib
import sys
import time

import jax
import numpy as np

from zeda_jax import distributed
from zeda_jax.checkpoint.orbax import CheckpointStore
from zeda_jax.cli import main as cli
from zeda_jax.cli.config_flags import take_process_flags
from zeda_jax.data.pipeline import prompt_batches
from zeda_jax.distill.metrics import MetricWriter
from zeda_jax.distill.objectives import Objective
from zeda_jax.distill.optimizer import OptimizerConfig, make_optimizer
from zeda_jax.distill.step import Reference, init_state, make_train_step
from zeda_jax.distill.trainer import StoppedEarly, run_training
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import reconfigured, split_model, trainable_partition
from zeda_jax.sharding import Rules, Sharding, make_mesh

# With the usual eps, Adam turns the rounding of a gradient near 0 into an update as large as any; not so with this one.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, eps=1e-3)
ROWS = 8


def global_batch(numbers):
  """One row for each number."""
  from tests.distill.batches import make_batch

  rows = [jax.tree.map(lambda a, n=n: a[n % 3], make_batch(int(n))) for n in numbers]
  return jax.tree.map(lambda *a: np.stack(a), *rows)


def train(flags):
  from tests.distill.batches import BALANCE  # late: it uses JAX, which distributed.initialize must come before
  from tests.tiny_models import tiny_model

  data, expert = map(int, flags.mesh.split("x"))
  sharding = Sharding(make_mesh(data, expert), rules=Rules(replicated_below=0))
  static = tiny_model(num_experts=8, moe_layers=(True,))
  student, params = split_model(reconfigured(inject(static), sharding=sharding))
  frozen_def, teacher_params = split_model(reconfigured(static, sharding=sharding))
  trained, frozen = trainable_partition(params, "all")
  transform = make_optimizer(OPTIMIZER, flags.steps)

  def onto_mesh(tree):
    return jax.tree.map(
      lambda x, where: jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__),
      tree,
      sharding.state(tree),
    )

  reference = Reference(onto_mesh(frozen), onto_mesh(teacher_params), BALANCE)
  state = init_state(onto_mesh(trained), transform, 0, sharding)
  step = make_train_step(student, frozen_def, Objective(), OPTIMIZER, flags.steps)
  me, count = jax.process_index(), jax.process_count()
  done = 0

  def step_fn(state, batch):
    nonlocal done
    state, metrics = step(state, reference, batch)
    done += 1
    print(f"made step {done}", flush=True)
    if flags.fail == f"{me}:{done}":
      raise ZedaError("this process fails on purpose.")
    if flags.crash == f"{me}:{done}":
      raise RuntimeError("this process crashes on purpose")
    time.sleep(flags.pause)
    return state, {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "data": batch["tokens"].sum()}

  with CheckpointStore(flags.directory / "checkpoints", keep=100) as store:
    print(f"starts after step {store.latest_step()}", flush=True)
    run_training(
      state=state,
      step_fn=step_fn,
      batches=prompt_batches(40, ROWS, 0, me, count),
      num_steps=flags.steps,
      store=store,
      save_every=flags.save_every,
      writer=MetricWriter(flags.directory, tensorboard=False),
      prepare=lambda numbers: distributed.rows_on_mesh(global_batch(numbers), sharding),
      make_batch=(lambda state, numbers, step: numbers) if flags.make_batch else None,
    )
  assert distributed.any_process(me == count - 1) and not distributed.any_process(False)
  assert distributed.same_for_all(np.int32(me)) == 0


def slow_saves(process, seconds):
  """Makes the background part of this process's share of every save take longer, and says when it begins."""
  import orbax.checkpoint as ocp

  async_save = ocp.StandardCheckpointHandler.async_save

  class Slowly:
    def result(self, timeout=None):
      print("saving", flush=True)
      if jax.process_index() == process:
        time.sleep(seconds)

  async def save(self, *args, **options):
    return [*(await async_save(self, *args, **options)), Slowly()]

  ocp.StandardCheckpointHandler.async_save = save


def run(command, args):
  places, args = take_process_flags(args)
  parser = argparse.ArgumentParser()
  parser.add_argument("directory", type=pathlib.Path)
  parser.add_argument("--mesh", default="1x1")
  parser.add_argument("--steps", type=int, default=6)
  parser.add_argument("--save-every", type=int, default=2)
  parser.add_argument("--pause", type=float, default=0.0)
  parser.add_argument("--slow-saves", default="", help="PROCESS:SECONDS")
  parser.add_argument("--make-batch", action="store_true")
  parser.add_argument("--fail", default="", help="PROCESS:STEP")
  parser.add_argument("--crash", default="", help="PROCESS:STEP")
  flags = parser.parse_args(args)
  distributed.initialize(**places)
  if flags.slow_saves:
    slow_saves(*map(int, flags.slow_saves.split(":")))
  try:
    train(flags)
  except StoppedEarly as stopped:
    if distributed.is_primary():
      print(stopped)
  return 0


if __name__ == "__main__":
  cli.COMMANDS["worker"] = ("worker", "trains a small model")
  sys.modules["zeda_jax.cli.worker"] = sys.modules["__main__"]
  sys.exit(cli.main(["worker", *sys.argv[1:]]))
