"""The whole recipe, in this process: its variants, its interruptions, and what it leaves behind."""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest

from tests.recipe_files import (
  arguments,
  assert_same_tensors,
  everything,
  settings,
  tensors,
  write_prompts,
  write_teacher,
)
from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.cli import main as cli
from zeda_jax.data.builder import JsonRecords
from zeda_jax.data.jsonl import JsonLines
from zeda_jax.distill import adapt as recipe
from zeda_jax.distill.metrics import MetricWriter
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate import runner
from zeda_jax.models.decoder import Decoder
from zeda_jax.rollout import stage as rollout_stage

ROWS = ["teacher", "injected", "sft", "student"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("files")
  write_teacher(directory / "teacher")
  write_prompts(directory / "prompts.jsonl")
  return directory


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
  """The workdir of an uninterrupted run."""
  return recipe.adapt(settings(files, tmp_path_factory.mktemp("whole") / "w", {"export.plain": True}))


def zeda(*args):
  return cli.main([str(arg) for arg in args])


def rollout_indices(workdir):
  return sorted(r["index"] for f in sorted((workdir / "rollouts").glob("*.jsonl")) for r in JsonLines(f))


def test_everything_is_there(files, whole):
  assert sorted(path.name for path in whole.iterdir()) == [
    *("evaluate", "opd", "recipe.json", "rollouts", "sft", "student", "student-plain", "summary.md")
  ]
  assert not [name for name in everything(whole) if "partial" in name or "tmp" in name]
  job = recipe.open_job(settings(files, whole))
  assert rollout_indices(whole) == job.train.tolist()
  for stage, steps in (("sft", None), ("opd", 4)):
    rows = [json.loads(line) for line in (whole / stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert steps in (None, len(rows))
    assert {"loss", "grad_norm", "zero_ratio", "zero_ratio/layer_00", "reverse_kl", "step_seconds"} <= rows[0].keys()


def test_rollouts_carry_the_prompt_s_own_fields(files, whole):
  prompts = JsonLines(files / "prompts.jsonl")
  for record in JsonLines(sorted((whole / "rollouts").glob("*.jsonl"))):
    prompt = prompts[record["index"]]
    assert {key: record[key] for key in prompt} == prompt
    assert 1 <= len(record["response_tokens"]) == len(record["logprobs"]) <= 8
    assert record["finished"] == (record["response_tokens"][-1] == 2)
    assert max(record["logprobs"]) < 0


def test_summary_has_all_rows(whole):
  measured = {name: json.loads((whole / "evaluate" / f"{name}.json").read_text()) for name in ROWS}
  assert measured["teacher"]["skipped"] == 0.0 and measured["teacher"]["distance"]["forward_kl"] == 0.0
  for name in ROWS[1:]:
    row = measured[name]
    assert 0.1 < row["skipped_response"] < 0.9 and row["distance"]["forward_kl"] > 0
    assert row["num_graded"] == {"all": 32} and row["accuracy"] == {"all": row["average"]}
  assert (whole / "summary.md").read_text().count("\n|") == 1 + len(ROWS)


def test_exported_directory_is_complete(files, whole):
  teacher, student = files / "teacher", whole / "student"
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
    assert (student / name).read_bytes() == (teacher / name).read_bytes()
  before, after = (json.loads((path / "config.json").read_text()) for path in (teacher, student))
  changed = {
    "model_type": "qwen3_moe_plus_plus",
    "architectures": ["Qwen3MoePlusPlusForCausalLM"],
    "zce_nums": [2],
    "zce_types": ["zero"],
    "use_zce_mask": False,
  }
  assert after == before | changed
  model = load_hf(student)
  assert isinstance(model, Decoder) and model.config.num_zero_experts == 2
  row = json.loads((whole / "evaluate" / "student.json").read_text())
  answers = json.loads((whole / "evaluate" / "teacher-responses.json").read_text())
  assert len(answers) == 32 and row["response_length"] > 0


def test_plain_export_is_right_in_stock_transformers(files, whole):
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(whole / "student-plain")
  tokens = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Explain: a list"}], add_generation_prompt=True, return_dict=False
  )
  stock = AutoModelForCausalLM.from_pretrained(whole / "student-plain").eval()
  with torch.no_grad():
    expected = stock(torch.tensor([tokens])).logits.numpy()
  found = load_hf(whole / "student")(np.asarray([tokens], np.int32)).logits
  np.testing.assert_allclose(found, expected, atol=2e-4)


def test_again_does_nothing_but_print_the_table(files, whole, monkeypatch, capsys):
  monkeypatch.setattr(recipe.Job, "teacher", property(lambda job: pytest.fail("the teacher was loaded")))
  before = {name: (whole / name).stat().st_mtime_ns for name in everything(whole) if name != "summary.md"}
  assert zeda("adapt", *arguments(files, whole)) == 0
  found = capsys.readouterr()
  assert found.err == "" and "student (exported)" in found.out
  assert {name: (whole / name).stat().st_mtime_ns for name in everything(whole) if name != "summary.md"} == before


def test_changed_settings_and_files_are_refused(files, whole, tmp_path, capsys):
  before = everything(whole)
  assert zeda("adapt", *arguments(files, whole, **{"sft.weight": 3})) == 2
  assert "was begun with config.sft.weight=2.0, now it is 3.0" in capsys.readouterr().err
  assert zeda("adapt", *arguments(files, whole, **{"evaluate.temperature": 1.0})) == 2
  assert "measured with config.evaluate.temperature=0.0" in capsys.readouterr().err
  assert zeda("adapt", *arguments(files, whole, **{"evaluate.num_prompts": 31})) == 2
  assert "another content of the prompts" in capsys.readouterr().err
  write_prompts(tmp_path / "prompts.jsonl", 199)
  assert zeda("adapt", *arguments(files, whole, prompts=tmp_path / "prompts.jsonl")) == 2
  assert "another content of the prompts" in capsys.readouterr().err
  shutil.copytree(files / "teacher", tmp_path / "teacher")
  tokenizer = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
  vocabulary = tokenizer["model"]["vocab"]
  first, second = list(vocabulary)[300:302]
  vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
  (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(tokenizer))
  assert zeda("adapt", *arguments(files, whole, teacher=tmp_path / "teacher")) == 2
  assert "another content of the teacher" in capsys.readouterr().err
  assert everything(whole) == before


def test_single_stages_stop_where_they_should_and_add_up(files, whole, tmp_path, capsys):
  expected = {"recipe.json"}
  for command, adds in (("rollout", {"rollouts"}), ("sft", {"sft"}), ("opd", {"opd"}), ("export", {"student"})):
    assert zeda(command, *arguments(files, tmp_path / "w")) == 0
    expected |= adds
    assert {path.name for path in (tmp_path / "w").iterdir()} == expected
  assert zeda("adapt", *arguments(files, tmp_path / "w")) == 0
  assert_same_tensors(tmp_path / "w" / "student", whole / "student")
  for name in ROWS:
    rows = [json.loads((workdir / "evaluate" / f"{name}.json").read_text()) for workdir in (whole, tmp_path / "w")]
    assert rows[0] | {"seconds": 0} == rows[1] | {"seconds": 0}
  # the plain format, asked for afterwards
  assert zeda("export", *arguments(files, tmp_path / "w", **{"export.plain": True})) == 0
  assert_same_tensors(tmp_path / "w" / "student-plain", whole / "student-plain")


class Interrupter:
  """Sends SIGTERM to this process when something returns for the n-th time."""

  def __init__(self, function, nth):
    self.function, self.left = function, nth

  def __call__(self, *args, **kwargs):
    result = self.function(*args, **kwargs)
    self.left -= 1
    if self.left == 0:
      os.kill(os.getpid(), signal.SIGTERM)
    return result


@contextlib.contextmanager
def survives_sigterm():
  """A signal that nobody handles would end the tests."""
  missed = []
  before = signal.signal(signal.SIGTERM, lambda *args: missed.append(args))
  try:
    yield missed
  finally:
    signal.signal(signal.SIGTERM, before)


def test_sigterm_in_every_stage(files, whole, tmp_path, monkeypatch, capsys):
  write = MetricWriter.write

  def interrupt_training(label):
    def writes(self, step, *rest):
      write(self, step, *rest)
      if self._label == label and step == 2:
        os.kill(os.getpid(), signal.SIGTERM)

    return writes

  # the first shard; the last shard; a step of each training; the export; the second model's evaluation
  moments = [
    (rollout_stage, "write_shard", Interrupter(rollout_stage.write_shard, 1), "with 84 of 168 prompts answered"),
    (rollout_stage, "write_shard", Interrupter(rollout_stage.write_shard, 1), "before SFT"),
    (MetricWriter, "write", interrupt_training("sft"), "sft stopped after step"),
    (MetricWriter, "write", interrupt_training("opd"), "opd stopped after step"),
    (recipe, "save_hf", Interrupter(recipe.save_hf, 1), "before the evaluation of teacher"),
    (runner, "generate", Interrupter(runner.generate, 2), "before the evaluation of sft"),
  ]
  for place, name, replacement, sentence in moments:
    with monkeypatch.context() as patch, survives_sigterm() as missed:
      patch.setattr(place, name, replacement)
      assert zeda("adapt", *arguments(files, tmp_path / "w")) == 0
      assert not missed
    found = capsys.readouterr()
    assert sentence in found.out and "run the same command again to go on." in found.out and found.err == ""
    assert not [name for name in everything(tmp_path / "w") if "partial" in name]
  assert zeda("adapt", *arguments(files, tmp_path / "w")) == 0
  assert_same_tensors(tmp_path / "w" / "student", whole / "student")
  assert rollout_indices(tmp_path / "w") == rollout_indices(whole)
  assert (tmp_path / "w" / "summary.md").read_text().count("\n|") == 1 + len(ROWS)


def test_sigterm_in_the_last_step_of_a_stage_is_not_lost(files, tmp_path, monkeypatch, capsys):
  save = recipe.run_sft

  def stops_at_its_end(*args):
    result = save(*args)
    os.kill(os.getpid(), signal.SIGTERM)
    return result

  with monkeypatch.context() as patch, survives_sigterm() as missed:
    patch.setattr(recipe, "run_sft", stops_at_its_end)
    assert zeda("adapt", *arguments(files, tmp_path / "w")) == 0
    assert not missed
  assert "stopped before OPD" in capsys.readouterr().out
  assert (tmp_path / "w" / "sft" / "finished.json").is_file() and not (tmp_path / "w" / "opd").exists()


def test_nan_keeps_the_last_good_checkpoint_and_a_lower_rate_goes_on(files, tmp_path, capsys):
  flags = {"sft.save_every": 1, "sft.keep": 1, "sft.optimizer.warmup_fraction": 0.0}
  wild = flags | {"sft.optimizer.learning_rate": 1e30}
  assert zeda("sft", *arguments(files, tmp_path / "w", **wild)) == 2
  found = capsys.readouterr()
  assert found.err.count("\n") == 1
  assert "of sft; " in found.err and "became" in found.err
  checkpoints = [path.name for path in (tmp_path / "w" / "sft" / "checkpoints").iterdir()]
  if checkpoints:  # what was saved was finite
    assert f"the last good checkpoint is {tmp_path / 'w' / 'sft' / 'checkpoints' / checkpoints[0]}" in found.err
  tame = flags | {"sft.optimizer.learning_rate": 1e-4}
  assert not (tmp_path / "w" / "sft" / "finished.json").exists()
  assert zeda("rollout", *arguments(files, tmp_path / "w", **tame)) == 0  # the setting is accepted


@contextlib.contextmanager
def file_size_limit(limit):
  """Writing past `limit` bytes of a file fails, as on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_left(files, whole, tmp_path, capsys):
  workdir = tmp_path / "w"
  for name in ("recipe.json", "rollouts", "sft", "opd"):
    copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
    (workdir / name).parent.mkdir(exist_ok=True)
    copy(whole / name, workdir / name)
  with file_size_limit(30_000):  # the weights take more
    assert zeda("export", *arguments(files, workdir)) == 2
  found = capsys.readouterr()
  assert "zeda export: " in found.err and "nothing was kept" in found.err and found.err.count("\n") == 1
  assert {path.name for path in workdir.iterdir()} == {"recipe.json", "rollouts", "sft", "opd"}
  assert zeda("export", *arguments(files, workdir)) == 0
  assert_same_tensors(workdir / "student", whole / "student")

  shutil.rmtree(workdir)
  with file_size_limit(20_000):  # a shard of rollouts takes more
    assert zeda("adapt", *arguments(files, workdir)) == 2
  found = capsys.readouterr()
  assert "no space left to write it, nothing was written" in found.err and found.err.count("\n") == 1
  assert everything(workdir) == ["recipe.json", "rollouts"]
  with file_size_limit(10):
    assert zeda("adapt", *arguments(files, tmp_path / "new")) == 2
  assert not (tmp_path / "new").exists()


def test_prompts_as_array_record(files, whole, tmp_path):
  builder = JsonRecords(source=str(files / "prompts.jsonl"), data_dir=str(tmp_path / "data"))
  builder.download_and_prepare()
  workdir = recipe.adapt(settings(files, tmp_path / "w", {"prompts": str(builder.data_dir)}), until="rollout")
  for file in (whole / "rollouts").iterdir():
    assert (workdir / "rollouts" / file.name).read_bytes() == file.read_bytes()


def trained_tensors(files, workdir):
  """Names of the teacher's tensors that the student has with other values."""
  before, after = tensors(files / "teacher"), tensors(workdir / "student")
  assert before.keys() == after.keys()
  return {name for name, old in before.items() if old.tobytes() != after[name][: len(old)].tobytes()}


ROUTER = {"model.layers.0.mlp.gate.weight"}
VARIANTS = {
  "the paper's losses": (
    {
      "sft.loss": "cross_entropy",
      "sft.teacher_metrics": False,
      "sft.accumulate": 2,
      "opd.loss": "sampled",
      "opd.trainable": "router",
    },
    lambda names: names > ROUTER and len(names) > 20,
  ),
  "router": (
    {"sft.trainable": "router", "opd.steps": 0},
    lambda names: names == ROUTER,
  ),
  "router+norms": (
    {"sft.epochs": 0, "opd.trainable": "router+norms", "opd.balance": "expert"},
    lambda names: names > ROUTER and all("norm" in name for name in names - ROUTER),
  ),
  "fewer picks, no zero experts": (
    {"student.num_zero_experts": 0, "student.num_experts_per_tok": 1, "opd.steps": 0},
    lambda names: names > ROUTER,
  ),
}


SLOW = ("router+norms", "fewer picks, no zero experts")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.slow) if v in SLOW else v for v in VARIANTS])
def test_variants(files, whole, tmp_path, variant):
  changes, expected = VARIANTS[variant]
  workdir = recipe.adapt(settings(files, tmp_path / "w", changes), until="export")
  assert expected(trained_tensors(files, workdir))
  load_hf(workdir / "student")


def test_without_evaluation(files, tmp_path, capsys):
  changes = {"evaluate.num_prompts": 0, "sft.epochs": 0, "opd.steps": 0}
  workdir = recipe.adapt(settings(files, tmp_path / "w", changes))
  assert sorted(path.name for path in workdir.iterdir()) == ["recipe.json", "student"]
  assert trained_tensors(files, workdir) == set()  # injected, untrained
  assert "held-out prompts" not in capsys.readouterr().out


def test_two_at_once_are_refused(files, whole, capsys):
  lock = os.open(whole, os.O_RDONLY)
  fcntl.flock(lock, fcntl.LOCK_EX)
  assert zeda("adapt", *arguments(files, whole)) == 2
  assert f"another process is working in {whole}" in capsys.readouterr().err
  os.close(lock)
  assert zeda("adapt", *arguments(files, whole)) == 0


def test_unknown_stage(files, tmp_path):
  with pytest.raises(ZedaError, match="until is 'train'"):
    recipe.adapt(settings(files, tmp_path / "w"), until="train")
