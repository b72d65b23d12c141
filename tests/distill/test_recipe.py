"""Settings: what is refused, and when a finished or unfinished run may go on."""

import json
import math

import pytest

from zeda_jax.distill.recipe import (
  check_config,
  claim_workdir,
  default_config,
  evaluation_settings,
  optimizer_config,
  write_json,
)
from zeda_jax.errors import ZedaError

CONTENTS = {"teacher": "a", "prompts": "b", "held-out prompts": "c"}


def config_with(workdir="w", **changes):
  config = default_config()
  config.update(teacher="t", prompts="p.jsonl", workdir=str(workdir))
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config


def test_the_defaults_are_valid():
  check_config(config_with())


@pytest.mark.parametrize(
  ("name", "value", "expected"),
  [
    ("teacher", "", "config.teacher is empty"),
    ("prompts", "", "config.prompts is empty"),
    ("workdir", "", "config.workdir is empty"),
    ("seed", -1, "at least 0"),
    ("dtype", "float8", "one of '', 'float32', 'bfloat16', 'float16'"),
    ("student__num_zero_experts", -1, "at least 1"),
    ("student__num_zero_experts", 0, "at least 1"),
    ("student__num_experts_per_tok", 0, "at least 1"),
    ("rollout__max_new_tokens", 0, "at least 1"),
    ("rollout__temperature", -0.5, "at least 0"),
    ("rollout__top_p", 0.0, "more than 0"),
    ("rollout__top_p", 1.5, "at most 1"),
    ("rollout__batch_size", 0, "at least 1"),
    ("rollout__shard_size", -5, "at least 1"),
    ("rollout__engine", "vllm", "one of 'jax', 'openai'"),
    ("rollout__engine", "openai", "config.rollout.url is empty"),
    ("rollout__url", "localhost:8000", "expected one such as http://localhost:8000/v1"),
    ("rollout__key_variable", "sk-123", "no name of an environment variable"),
    ("rollout__concurrency", 0, "at least 1"),
    ("rollout__retries", -1, "at least 0"),
    ("rollout__timeout", 0.0, "at least 1"),
    ("rollout__max_dropped", 1.5, "at most 1"),
    ("sft__epochs", -1, "at least 0"),
    ("sft__batch_size", 0, "at least 1"),
    ("sft__row_length", 1, "at least 2"),
    ("sft__weight", 0.0, "more than 0"),
    ("sft__weight", math.nan, "a finite number"),
    ("sft__coefficient", -0.1, "at least 0"),
    ("remat", "full", "one of 'none', 'dots', 'layer'"),
    ("sft__loss", "kl", "one of 'cross_entropy', 'forward_kl'"),
    ("sft__trainable", "routers", "one of 'all', 'router', 'router+norms'"),
    ("sft__balance", "expertise", "one of 'group', 'expert', 'adamoe', 'none'"),
    ("sft__optimizer__schedule", "cosin", "one of 'cosine', 'constant', 'linear'"),
    ("sft__optimizer__learning_rate", -1e-3, "at least 0"),
    ("sft__optimizer__learning_rate", math.inf, "a finite number"),
    ("sft__optimizer__warmup_fraction", 1.5, "at most 1"),
    ("sft__accumulate", 3, "does not divide 128 rows"),
    ("opd__loss", "forward_kl", "one of 'sampled', 'reverse_kl'"),
    ("opd__steps", -1, "at least 0"),
    ("opd__prompts_per_step", 0, "at least 1"),
    ("opd__accumulate", 5, "does not divide 32 rows"),
    ("opd__keep", 0, "at least 1"),
    ("opd__save_every", 0, "at least 1"),
    ("evaluate__num_prompts", -1, "at least 0"),
    ("evaluate__max_new_tokens", 0, "at least 1"),
    ("evaluate__grader", "judge", "one of 'exact', 'number'"),
    ("evaluate__models", ("teacher,student",), "expected names"),
  ],
)
def test_bad_values(name, value, expected):
  with pytest.raises(ZedaError) as error:
    check_config(config_with(**{name: value}))
  assert expected in str(error.value)
  assert f"config.{name.replace('__', '.')}" in str(error.value)
  assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_static_student_needs_fewer_picks():
  check_config(config_with(student__num_zero_experts=0, student__num_experts_per_tok=4))


def test_every_number_has_a_range():
  """A setting added later must say what it may be."""

  def numbers(tree, prefix=""):
    for name, value in tree.items():
      if isinstance(value, dict):
        yield from numbers(value, f"{prefix}{name}.")
      elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix + name

  for name in numbers(default_config().to_dict()):
    with pytest.raises(ZedaError, match=name):
      check_config(config_with(**{name: -3}))


def test_incomplete_configuration():
  config = config_with().unlock()
  del config.sft["epochs"]
  with pytest.raises(ZedaError, match=r"config\.sft\.epochs is missing"):
    check_config(config)
  config = config_with().unlock()
  config.sft.epoch = 1
  with pytest.raises(ZedaError, match=r"config\.sft\.epoch is no setting"):
    check_config(config)


def test_optimizer_config_has_the_section_s_values():
  config = config_with(opd__optimizer__clip_norm=0.5)
  assert optimizer_config(config.opd).clip_norm == 0.5
  assert optimizer_config(config.opd).learning_rate == 5e-6
  assert optimizer_config(config.sft).schedule == "cosine"


def test_claim_and_come_back(tmp_path):
  workdir = tmp_path / "a" / "b"
  assert claim_workdir(config_with(workdir), CONTENTS) == workdir
  assert [path.name for path in workdir.iterdir()] == ["recipe.json"]
  before = (workdir / "recipe.json").read_bytes()
  claim_workdir(config_with(workdir), CONTENTS)
  # what changes neither parameters nor rollouts is free, the paths of unchanged files included
  free = {
    "teacher": "elsewhere",
    "prompts": "elsewhere",
    "rollout__batch_size": 3,
    "sft__save_every": 7,
    "opd__log_every": 9,
    "export__plain": True,
    "evaluate__models": ("student",),
  }
  claim_workdir(config_with(workdir, **free), CONTENTS)
  assert (workdir / "recipe.json").read_bytes() == before


@pytest.mark.parametrize(
  ("name", "value"), [("sft__weight", 3.0), ("seed", 1), ("rollout__shard_size", 8), ("student__num_zero_experts", 2)]
)
def test_a_changed_setting_is_refused(tmp_path, name, value):
  claim_workdir(config_with(tmp_path), CONTENTS)
  with pytest.raises(ZedaError, match=rf"begun with config\.{name.replace('__', '.')}=.*now it is {value}"):
    claim_workdir(config_with(tmp_path, **{name: value}), CONTENTS)


@pytest.mark.parametrize("name", ["teacher", "prompts"])
def test_other_files_are_refused(tmp_path, name):
  claim_workdir(config_with(tmp_path), CONTENTS)
  with pytest.raises(ZedaError, match=f"another content of the {name}"):
    claim_workdir(config_with(tmp_path), CONTENTS | {name: "other"})


def test_evaluation_may_change_until_something_is_measured(tmp_path):
  claim_workdir(config_with(tmp_path), CONTENTS)
  changed = config_with(tmp_path, evaluate__temperature=0.5)
  claim_workdir(changed, CONTENTS | {"held-out prompts": "other"})
  write_json(tmp_path / "evaluate" / "settings.json", evaluation_settings(changed, CONTENTS))
  claim_workdir(changed, CONTENTS)
  with pytest.raises(ZedaError, match=r"measured with config\.evaluate\.temperature=0\.5, now it is 0\.0"):
    claim_workdir(config_with(tmp_path), CONTENTS)
  with pytest.raises(ZedaError, match="another content of the held-out prompts"):
    claim_workdir(changed, CONTENTS | {"held-out prompts": "other"})


def test_the_learning_rate_may_be_lowered_until_the_stage_is_finished(tmp_path):
  """What a run that met NaN tells its user to do."""
  claim_workdir(config_with(tmp_path, sft__optimizer__learning_rate=1.0), CONTENTS)
  claim_workdir(config_with(tmp_path, sft__optimizer__learning_rate=1e-3), CONTENTS)
  assert json.loads((tmp_path / "recipe.json").read_text())["sft.optimizer.learning_rate"] == 1e-3
  write_json(tmp_path / "sft" / "finished.json", {"steps": 3})
  with pytest.raises(ZedaError, match=r"sft\.optimizer\.learning_rate=0\.001"):
    claim_workdir(config_with(tmp_path, sft__optimizer__learning_rate=1e-4), CONTENTS)
  claim_workdir(config_with(tmp_path, sft__optimizer__learning_rate=1e-3, opd__optimizer__clip_norm=0.1), CONTENTS)


def test_places_that_cannot_be_a_workdir(tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  (other / "mine.txt").write_text("precious")
  with pytest.raises(ZedaError, match="not empty and holds no run"):
    claim_workdir(config_with(other), CONTENTS)
  assert [path.name for path in other.iterdir()] == ["mine.txt"]
  with pytest.raises(ZedaError, match="is a file"):
    claim_workdir(config_with(other / "mine.txt"), CONTENTS)
  with pytest.raises(ZedaError, match="cannot be written"):
    claim_workdir(config_with(other / "mine.txt" / "below"), CONTENTS)


def test_a_run_killed_at_its_very_start_can_be_started_again(tmp_path):
  (tmp_path / ".recipe.json.partial").write_text("{")
  claim_workdir(config_with(tmp_path), CONTENTS)
  assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_damaged_recipe_is_told(tmp_path):
  (tmp_path / "recipe.json").write_text("{")
  with pytest.raises(ZedaError, match=r"recipe\.json is not valid JSON"):
    claim_workdir(config_with(tmp_path), CONTENTS)


def test_a_setting_that_is_new_had_its_default(tmp_path):
  config = config_with(teacher="t", prompts="p", workdir=str(tmp_path / "run"))
  contents = {"teacher": "1", "prompts": "2"}
  file = claim_workdir(config, contents) / "recipe.json"
  settings = json.loads(file.read_text())
  del settings["student.renormalize"]
  file.write_text(json.dumps(settings))
  claim_workdir(config, contents)
  with pytest.raises(ZedaError, match=r"was begun with config.student.renormalize=False, now it is True"):
    claim_workdir(
      config_with(teacher="t", prompts="p", workdir=str(tmp_path / "run"), student__renormalize=True), contents
    )
