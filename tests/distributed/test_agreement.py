"""Errors, decisions and files of several processes, in a program of two."""

import errno
import pathlib
import resource
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from tests.multiprocess import run_everywhere
from tests.recipe_files import assert_same_tensors, everything, settings, write_prompts, write_teacher
from tests.tiny_models import GLM, tiny_model
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.distill import adapt as recipe
from zeda_jax.distill.job import Job
from zeda_jax.distill.trainer import StoppedEarly
from zeda_jax.distributed.agreement import from_primary, raise_together, together
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import inject
from zeda_jax.models.params import reconfigured, split_model
from zeda_jax.rollout import stage as rollout_stage
from zeda_jax.rollout.requests import Completion
from zeda_jax.sharding import Rules, Sharding, make_mesh

THIS = "tests.distributed.test_agreement"


def test_one_process_does_the_plain_thing():
  assert together(lambda: 3) == from_primary(lambda: 3) == 3
  raise_together()
  for function in (together, from_primary):
    with pytest.raises(OSError, match="full"):
      function(lambda: fail(OSError("full")))


def fail(error):
  raise error


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("files")
  write_teacher(directory / "teacher")
  write_prompts(directory / "prompts.jsonl", 50)
  return directory


def test_two_processes(files, tmp_path):
  # bfloat16 weights beside float32 biases: the order of writing is not that of the plan.
  model = tiny_model(num_experts=8, **GLM)
  save_hf(model, tmp_path / "float32")
  save_hf(load_hf(tmp_path / "float32", "bfloat16"), tmp_path / "static")
  save_hf(inject(load_hf(tmp_path / "static"), seed=3), tmp_path / "expected")
  run_everywhere(f"{THIS}:check_all", 2, 2, files, tmp_path)
  assert_same_tensors(tmp_path / "saved", tmp_path / "expected")
  for name in ("config.json", "model.safetensors"):
    assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "float32", "full", "saved", "static", "w"]
  assert everything(tmp_path / "full") == ["recipe.json", "rollouts"]


def check_all(files, directory):
  files, directory = pathlib.Path(files), pathlib.Path(directory)
  check_values()
  check_errors()
  check_stop()
  check_injected_and_saved(directory)
  check_inputs_and_storage(files, directory)
  check_full_disk(files, directory)


def mine():
  return jax.process_index()


def check_values():
  assert together(mine) == mine()
  assert from_primary(mine) == 0
  assert from_primary(lambda: None) is None
  assert from_primary(lambda: {"long": "é" * 5000, "number": 1.5}) == {"long": "é" * 5000, "number": 1.5}


def check_errors():
  for guilty in (0, 1):

    def action(guilty=guilty):
      for step in range(4):
        raise_together()
        if mine() == guilty and step == 2:
          raise OSError(errno.ENOSPC, "disk full")

    expected = OSError if mine() == guilty else ZedaError
    with pytest.raises(expected, match="disk full") as caught:
      together(action)
    assert mine() == guilty or f"process {guilty} of 2 stopped: OSError" in str(caught.value)
  with pytest.raises(ZedaError, match=r"no such|nothing there"):
    from_primary(lambda: fail(ZedaError("nothing there")))
  assert from_primary(mine) == 0  # they still walk in step


def check_stop():
  for signalled in (None, 0, 1):
    job = types.SimpleNamespace(stop=types.SimpleNamespace(requested=mine() == signalled))
    if signalled is None:
      Job.check_stop(job, "here")
    else:
      with pytest.raises(StoppedEarly, match="stopped here"):
        Job.check_stop(job, "here")


def check_injected_and_saved(directory):
  sharding = Sharding(make_mesh(2, 2), rules=Rules(replicated_below=0))
  static = reconfigured(load_hf(directory / "static", sharding=sharding.parameter), sharding=sharding)
  model = inject(static, seed=3)
  (_, params), (_, before) = split_model(model), split_model(static)
  places = sharding.state(params)
  jax.tree.map(lambda leaf, where: check(leaf.sharding.is_equivalent_to(where, leaf.ndim)), params, places)
  assert params["runs"][1]["mlp"]["experts"]["down"] is before["runs"][1]["mlp"]["experts"]["down"]
  save_hf(model, directory / "saved")
  with pytest.raises(ZedaError, match="is not empty"):
    save_hf(model, directory / "saved")
  with limited_files(20_000), pytest.raises(ZedaError, match="nothing was kept"):
    save_hf(model, directory / "never")


def check(condition):
  assert condition


class limited_files:
  """Writing past so many bytes of a file fails in the primary process, as on a full disk."""

  def __init__(self, limit):
    self.limit = limit

  def __enter__(self):
    self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mine() == 0:
      resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

  def __exit__(self, *exc):
    resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def check_inputs_and_storage(files, directory):
  config = settings(files, directory / ("w" if mine() == 0 else "elsewhere"))
  (directory / "elsewhere").mkdir(exist_ok=True)
  with pytest.raises(ZedaError, match="does not see what process 0 writes"):
    recipe.adapt(config, until="rollout")
  if mine() == 0:
    (directory / "elsewhere").rmdir()  # where nothing was written
    assert [path.name for path in (directory / "w").iterdir()] == ["recipe.json"]
  config = settings(files, directory / "w", {"seed": mine()})
  with pytest.raises(ZedaError, match=r"has another config\.seed"):
    recipe.adapt(config, until="rollout")
  config = settings(files, directory / "w", {"mesh.expert": 3})
  with pytest.raises(ZedaError, match=r"config\.mesh: .*data=-1 x expert=3 does not fit the 4 devices"):
    recipe.adapt(config, until="rollout")
  config = settings(files, directory / "w", {"sft.batch_size": 15})
  with pytest.raises(ZedaError, match=r"config\.sft\.batch_size is 15, which 2 processes cannot share"):
    recipe.adapt(config, until="rollout")
  if mine() == 1:
    files = files / "not-there"
  with pytest.raises(ZedaError, match="not-there"):
    recipe.adapt(settings(files, directory / "w"), until="rollout")


def check_full_disk(files, directory):
  """A shard that the primary process cannot write ends the run in all."""
  calls = []

  class Answers:
    """An engine that knows all answers."""

    def run(self, requests, progress):
      for place in range(len(requests)):
        progress(place, len(requests))
        calls.append(place)
        yield place, Completion(place, 0, list(range(3, 9)), [-1.0] * 6, [-1.0] * 6, 0.0, 0.0, "length")

    def statistics(self):
      return types.SimpleNamespace(tokens_per_second=0.0)

  rollout_stage.engine_for = lambda *args: Answers()
  changes = {"rollout.batch_size": 3, "rollout.shard_size": 32, "evaluate.num_prompts": 2}
  with limited_files(3000), pytest.raises(ZedaError, match="no space left to write it, nothing was written"):
    recipe.adapt(settings(files, directory / "full", changes), until="rollout")
  assert len(set(multihost_utils.process_allgather(np.int32(len(calls))).tolist())) == 1  # none went on alone
  assert len(calls) < 24
