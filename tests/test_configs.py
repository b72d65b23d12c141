"""The recipe files, and the defaults they start from."""

import pathlib

import pytest

import zeda_jax
from zeda_jax.cli.config_flags import parse_config
from zeda_jax.distill.recipe import check_config

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PATHS = ["--config.teacher=t", "--config.prompts=p.jsonl", "--config.workdir=w"]


def parsed(name, *flags):
  return parse_config("adapt", [f"--config={CONFIGS / name}", *PATHS, *flags])


@pytest.mark.parametrize("name", sorted(file.name for file in CONFIGS.glob("*.py")))
def test_each_is_complete_locked_and_valid(name):
  config = parsed(name, "--config.sft.weight=3", "--config.opd.optimizer.learning_rate=1e-3", "--config.seed=7")
  check_config(config)
  assert (config.sft.weight, config.opd.optimizer.learning_rate, config.seed) == (3.0, 1e-3, 7)
  assert config.is_locked
  with pytest.raises(AttributeError):
    config.sft.new_name = 1


def test_the_paper_s_settings():
  """Every number that method.md, section 4, gives for Qwen3-30B-A3B."""
  config = parsed("qwen3_30b_a3b.py")
  sft, opd = config.sft, config.opd
  assert config.student.num_zero_experts == 64
  assert (sft.loss, sft.epochs, sft.batch_size, sft.trainable) == ("cross_entropy", 1, 128, "all")
  assert (opd.loss, opd.steps, opd.prompts_per_step, opd.samples_per_prompt) == ("sampled", 320, 16, 2)
  assert (opd.temperature, opd.max_new_tokens, opd.trainable) == (1.0, 32768, "all")
  for stage in (sft, opd):
    assert (stage.balance, stage.weight, stage.coefficient) == ("group", 2.0, 0.1)
    assert (stage.optimizer.b1, stage.optimizer.b2, stage.optimizer.weight_decay) == (0.9, 0.98, 0.1)
  assert (sft.optimizer.learning_rate, sft.optimizer.schedule, sft.optimizer.warmup_fraction) == (2e-5, "cosine", 0.1)
  assert (opd.optimizer.learning_rate, opd.optimizer.schedule, opd.optimizer.warmup_fraction) == (5e-6, "constant", 0.0)
  # section 5: how it is evaluated
  evaluation = config.evaluate
  assert (evaluation.temperature, evaluation.top_p, evaluation.top_k) == (0.6, 0.95, 20)
  assert evaluation.max_new_tokens == 38912


def test_glm_differs_in_zero_experts_and_the_rate_of_opd():
  glm, qwen = parsed("glm_4_7_flash.py").to_dict(), parsed("qwen3_30b_a3b.py").to_dict()
  assert glm["student"].pop("num_zero_experts") == 32
  assert glm["opd"]["optimizer"].pop("learning_rate") == 1e-6
  qwen["student"].pop("num_zero_experts")
  qwen["opd"]["optimizer"].pop("learning_rate")
  assert glm == qwen


def test_the_paper_s_settings_are_the_defaults():
  """Nobody's own config file falls below them by leaving something out."""
  paper = parsed("qwen3_30b_a3b.py").to_dict()
  defaults = zeda_jax.default_config().to_dict()
  assert paper["sft"] == defaults["sft"]
  assert paper["opd"] == defaults["opd"]
  assert paper["rollout"] == defaults["rollout"]


def test_tiny_is_for_a_laptop():
  config = parsed("tiny.py")
  assert (config.sft.loss, config.opd.loss) == ("forward_kl", "reverse_kl")
  longest = max(config.rollout.max_new_tokens, config.opd.max_new_tokens, config.evaluate.max_new_tokens)
  assert longest <= 64 and config.sft.row_length <= 1024
  assert config.sft.batch_size * config.sft.row_length <= 2**14  # tokens of a step
  assert config.remat == "none"
