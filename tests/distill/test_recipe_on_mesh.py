"""`zeda adapt` on meshes and in several processes gives what one device gives."""

import json

import numpy as np
import pytest

from tests.multiprocess import run_everywhere
from tests.recipe_files import settings, tensors, write_prompts, write_teacher

THIS = "tests.distill.test_recipe_on_mesh"
# Batches that no mesh divides; parts; training and sampling at once; a row that ends an epoch's last batch empty.
SETTINGS = {
  "rollout.batch_size": 20,
  "rollout.shard_size": 24,
  "sft.batch_size": 6,
  "sft.accumulate": 2,
  "sft.row_length": 64,
  "opd.steps": 3,
  "opd.prompts_per_step": 3,
  "opd.samples_per_prompt": 2,
  "opd.accumulate": 2,
  "evaluate.num_prompts": 0,
  # With the usual eps, Adam turns the rounding of a gradient near 0 into an update as large as any.
  "sft.optimizer.eps": 1e-3,
  "opd.optimizer.eps": 1e-3,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("files")
  write_teacher(directory / "teacher", num_experts=8)
  write_prompts(directory / "prompts.jsonl", 50)
  return directory


def adapt(files, workdir, changes):
  import pathlib

  from zeda_jax.distill.adapt import adapt as run

  run(settings(pathlib.Path(files), pathlib.Path(workdir), SETTINGS | changes))


EVALUATED = {"evaluate.num_prompts": 11, "evaluate.batch_size": 20, "export.plain": True}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "w"
  run_everywhere(f"{THIS}:adapt", 1, 1, files, workdir, {})
  return workdir


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("evaluated") / "w"
  run_everywhere(f"{THIS}:adapt", 1, 1, files, workdir, EVALUATED)
  return workdir


def rows(workdir, stage):
  return [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, expected):
  """Rollouts, metrics of each step, exported weights and the table's numbers; no file that is not in both."""
  for file in sorted((expected / "rollouts").iterdir()):
    answers = [list(map(json.loads, (d / "rollouts" / file.name).read_text().splitlines())) for d in (found, expected)]
    for one, two in zip(*answers, strict=True):
      np.testing.assert_allclose(one.pop("logprobs"), two.pop("logprobs"), rtol=1e-5, atol=1e-5)
      assert one == two
  for stage in ("sft", "opd"):
    for one, two in zip(rows(found, stage), rows(expected, stage), strict=True):
      for name, value in two.items():
        if name not in ("step_seconds", "tokens_per_second"):
          np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{stage} {two['step']} {name}")
  weights, expected_weights = (tensors(d / "student") for d in (found, expected))
  assert weights.keys() == expected_weights.keys()
  for name, value in expected_weights.items():
    np.testing.assert_allclose(weights[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
  names = [sorted(path.name for path in directory.iterdir()) for directory in (found, expected)]
  assert names[0] == names[1]


def assert_same_table(found, expected):
  for name in ("teacher", "injected", "sft", "student"):
    one, two = (json.loads((d / "evaluate" / f"{name}.json").read_text()) for d in (found, expected))
    for key in ("accuracy", "num_graded", "response_length"):
      assert one[key] == two[key]
    for key in ("skipped", "skipped_response"):
      np.testing.assert_allclose(one[key], two[key], rtol=1e-5)
    for key, value in two["distance"].items():
      np.testing.assert_allclose(one["distance"][key], value, rtol=1e-4, atol=1e-7, err_msg=key)
  answers = [(d / "evaluate" / "teacher-responses.json").read_text() for d in (found, expected)]
  assert answers[0] == answers[1]


def test_two_processes(files, whole, tmp_path):
  first, second = run_everywhere(f"{THIS}:adapt", 2, 2, files, tmp_path / "w", {"mesh.expert": 2})
  assert "data=2 x expert=2: 4 devices (cpu), 2 processes" in first and "exported to" in first
  assert "sft" not in second
  assert_same_run(tmp_path / "w", whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices, expert", [(1, 8, 4), (2, 4, 2), (2, 1, 1), (3, 1, 1)])
def test_meshes_and_processes(files, evaluated, tmp_path, processes, devices, expert):
  changes = EVALUATED | {"mesh.expert": expert}
  first, *others = run_everywhere(f"{THIS}:adapt", processes, devices, files, tmp_path / "w", changes)
  assert f"expert={expert}: {processes * devices} devices (cpu)" in first and "student (exported)" in first
  assert not [text for text in others if "student" in text]
  assert_same_run(tmp_path / "w", evaluated)
  assert_same_table(tmp_path / "w", evaluated)


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(1, 4), (2, 2)])
def test_rollouts_made_ahead(files, tmp_path, processes, devices):
  run_everywhere(f"{THIS}:adapt", 1, 1, files, tmp_path / "one", {"opd.overlap": True})
  run_everywhere(f"{THIS}:adapt", processes, devices, files, tmp_path / "w", {"opd.overlap": True, "mesh.expert": 2})
  assert_same_run(tmp_path / "w", tmp_path / "one")


@pytest.mark.slow
def test_goes_on_where_one_device_stopped(files, evaluated, tmp_path):
  """What one device sampled and trained is read onto a mesh; the stage after it is that of one device."""
  from zeda_jax.distill.adapt import adapt as run

  run(settings(files, tmp_path / "w", SETTINGS | EVALUATED), until="sft")
  run_everywhere(f"{THIS}:adapt", 1, 4, files, tmp_path / "w", EVALUATED | {"mesh.expert": 2})
  assert_same_run(tmp_path / "w", evaluated)
  assert_same_table(tmp_path / "w", evaluated)
