"""Bad input of `zeda adapt`: one sentence, exit status 2, before any work, nothing written."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.recipe_files import arguments, everything, settings, write_prompts, write_teacher
from tests.tiny_models import hf_model
from zeda_jax.cli import main as cli
from zeda_jax.distill.job import open_job
from zeda_jax.errors import ZedaError


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
  directory = tmp_path_factory.mktemp("originals")
  write_teacher(directory / "teacher", shard="30KB")
  write_prompts(directory / "prompts.jsonl", 60)
  return directory


@pytest.fixture
def files(tmp_path, originals):
  shutil.copytree(originals, tmp_path / "files")
  return tmp_path / "files"


def shards(files):
  return sorted((files / "teacher").glob("model-*.safetensors"))


def edit_config(files, **changes):
  file = files / "teacher" / "config.json"
  raw = json.loads(file.read_text())
  raw = {k: v for k, v in (raw | changes).items() if v is not None}
  file.write_text(json.dumps(raw))


def edit_tensor(files, name, change):
  for file in shards(files):
    tensors = load_file(file)
    if name in tensors:
      tensors[name] = change(tensors[name])
      save_file(tensors, file)
      return
  raise KeyError(name)


def remove_shard(files):
  shards(files)[0].unlink()


def truncate_shard(files):
  data = shards(files)[0].read_bytes()
  shards(files)[0].write_bytes(data[:-100])


def misname_shard(files):
  index = files / "teacher" / "model.safetensors.index.json"
  raw = json.loads(index.read_text())
  raw["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
  index.write_text(json.dumps(raw))


def wrong_shape(files):
  edit_tensor(files, "model.layers.0.mlp.gate.weight", lambda w: np.ascontiguousarray(w[:-1]))


def pickles_only(files):
  for file in (files / "teacher").glob("model*"):
    file.unlink()
  (files / "teacher" / "pytorch_model.bin").write_bytes(b"\x80\x04")


def no_tokenizer(files):
  (files / "teacher" / "tokenizer.json").unlink()


def another_models_tokenizer(files):
  edit_config(files, vocab_size=300)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    edit_tensor(files, name, lambda w: np.ascontiguousarray(w[:300]))


def break_line(files):
  file = files / "prompts.jsonl"
  lines = file.read_text().splitlines()
  lines[6] = lines[6][:-3]
  file.write_text("\n".join(lines))


def no_prompt(files):
  file = files / "prompts.jsonl"
  file.write_text(file.read_text() + '{"text": "prompt is called otherwise"}\n')


def long_prompt(files):
  file = files / "prompts.jsonl"
  file.write_text(file.read_text() + json.dumps({"prompt": "so many words " * 60}) + "\n")


def empty_prompts(files):
  (files / "prompts.jsonl").write_text("")


def no_prompts(files):
  (files / "prompts.jsonl").unlink()


def no_teacher(files):
  shutil.rmtree(files / "teacher")


def no_chat_template(files):
  (files / "teacher" / "chat_template.jinja").unlink()


# (what is done to the files, flags, what the sentence must contain)
CASES = {
  "missing shard": (remove_shard, {}, ["model-00001-of-", "download the missing"]),
  "truncated shard": (truncate_shard, {}, ["is truncated"]),
  "index naming a missing file": (misname_shard, {}, ["model-00009-of-00009.safetensors"]),
  "wrong tensor shape": (wrong_shape, {}, ["mlp.gate.weight [3, 16] instead of [4, 16]"]),
  "unsupported model_type": (lambda f: edit_config(f, model_type="llama"), {}, ["model_type is 'llama'", "qwen3_moe"]),
  "pickles only": (pickles_only, {}, ["only pickled weights (pytorch_model.bin)"]),
  "no num_experts": (lambda f: edit_config(f, num_local_experts=None, num_experts=None), {}, ["num_experts"]),
  "dynamic teacher": (
    lambda f: edit_config(f, model_type="qwen3_moe_plus_plus", zce_nums=[2], zce_types=["zero"]),
    {},
    ["already has zero experts"],
  ),
  "no teacher": (no_teacher, {}, ["config.json does not exist"]),
  "no tokenizer": (no_tokenizer, {}, ["has no tokenizer"]),
  "tokenizer of another model": (another_models_tokenizer, {}, ["vocab_size is 300", "another model's"]),
  "no chat template": (no_chat_template, {}, ["prompts.jsonl:1:", "no chat template"]),
  "broken line": (break_line, {}, ["prompts.jsonl:7: broken JSON"]),
  "no prompt in a record": (no_prompt, {}, ["prompts.jsonl:61: neither 'prompt' nor 'messages'"]),
  "prompt longer than the context": (long_prompt, {}, ["prompts.jsonl:61: the prompt has", "context of 96"]),
  "no prompts": (no_prompts, {}, ["prompts.jsonl matches no file"]),
  "empty prompts": (empty_prompts, {}, ["prompts.jsonl is empty"]),
  "negative zero experts": (None, {"student.num_zero_experts": -1}, ["num_zero_experts is -1"]),
  "no zero experts": (None, {"student.num_zero_experts": 0}, ["num_zero_experts is 0"]),
  "more picks than experts": (None, {"student.num_experts_per_tok": 9}, ["num_experts_per_tok is 9"]),
  "answers longer than the context": (None, {"rollout.max_new_tokens": 96}, ["more than the context of 96"]),
  "evaluation longer than the context": (None, {"evaluate.max_new_tokens": 96}, ["more than the context of 96"]),
  "rows shorter than a prompt": (None, {"sft.row_length": 12}, ["prompts.jsonl:", "sft.row_length=12"]),
  "a cache too small": (None, {"opd.cache_tokens": 20}, ["config.opd.cache_tokens is 20", "at least 64"]),
  "larger steps than prompts": (None, {"opd.prompts_per_step": 29}, ["prompts_per_step is 29", "28 prompts"]),
  "all prompts held out": (None, {"evaluate.num_prompts": 60}, ["evaluate.num_prompts is 60"]),
  "held-out file missing": (None, {"evaluate.prompts": "nowhere.jsonl"}, ["nowhere.jsonl matches no file"]),
  "negative batch": (None, {"sft.batch_size": -4}, ["config.sft.batch_size is -4"]),
  "unknown loss": (None, {"sft.loss": "forward"}, ["config.sft.loss is 'forward'", "forward_kl"]),
  "unknown setting": (None, {"sft.epoch": 1}, ["did you mean config.sft.epochs?"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(files, tmp_path, capsys, case):
  damage, flags, expected = CASES[case]
  if damage is not None:
    damage(files)
  before = everything(tmp_path)
  assert cli.main(["adapt", *arguments(files, tmp_path / "new" / "work", **flags)]) == 2
  found = capsys.readouterr()
  assert found.out == ""
  assert found.err.startswith("zeda adapt: ") and found.err.count("\n") == 1 and found.err[-2:] in (".\n", "?\n")
  for text in expected:
    assert text in found.err
  assert everything(tmp_path) == before


def test_a_workdir_with_other_things_in_it(files, capsys):
  before = everything(files)
  assert cli.main(["adapt", *arguments(files, files)]) == 2
  assert "is not empty and holds no run of this command" in capsys.readouterr().err
  assert everything(files) == before


@pytest.mark.parametrize("count", ["-1", "0"])
def test_inject_refuses_no_zero_experts(files, tmp_path, capsys, count):
  assert cli.main(["inject", str(files / "teacher"), str(tmp_path / "out"), f"--num-zero-experts={count}"]) == 2
  assert f"num_zero_experts is {count}" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_prompts_are_split_once_and_for_all(files, tmp_path):
  first, second = (open_job(settings(files, tmp_path / "w")) for _ in range(2))
  np.testing.assert_array_equal(first.train, second.train)
  assert sorted([*first.train, *first.held_out]) == list(range(60))
  assert len(first.held_out) == 32
  assert first.contents == second.contents


def test_held_out_prompts_of_their_own(files, tmp_path):
  write_prompts(files / "held-out.jsonl", 10)
  job = open_job(settings(files, tmp_path / "w", {"evaluate.prompts": str(files / "held-out.jsonl")}))
  assert len(job.train) == 60 and len(job.held_out) == 10
  held_out = pathlib.Path(files / "held-out.jsonl").read_text()
  write_prompts(files / "held-out.jsonl", 9)
  fewer = open_job(settings(files, tmp_path / "w", {"evaluate.prompts": str(files / "held-out.jsonl")}))
  assert held_out and fewer.contents["held-out prompts"] != job.contents["held-out prompts"]
  assert fewer.contents["prompts"] == job.contents["prompts"]


def test_fingerprints_follow_the_content(files, tmp_path):
  before = open_job(settings(files, tmp_path / "w")).contents
  shutil.move(files, tmp_path / "moved")
  assert open_job(settings(tmp_path / "moved", tmp_path / "w")).contents == before
  edit_tensor(tmp_path / "moved", "model.norm.weight", lambda w: w * 2)
  file = tmp_path / "moved" / "prompts.jsonl"
  file.write_text(file.read_text().replace("docs-1", "docs-x"))
  after = open_job(settings(tmp_path / "moved", tmp_path / "w")).contents
  assert all(after[name] != before[name] for name in ("teacher", "prompts"))


def test_end_of_answers_may_be_known_to_the_tokenizer_alone(files, tmp_path):
  job = open_job(settings(files, tmp_path / "w"))
  (files / "teacher" / "generation_config.json").unlink()
  edit_config(files, eos_token_id=None)
  bare = open_job(settings(files, tmp_path / "w"))
  assert bare.eos_ids == job.eos_ids == (job.tokenizer.eos_token_id,)
  assert bare.teacher.config.eos_token_ids == bare.eos_ids


def test_a_plain_export_that_cannot_be_is_refused_at_the_start(files, tmp_path):
  hf_model(model_type="glm4_moe_lite", n_group=2).save_pretrained(files / "grouped")
  config = settings(files, tmp_path / "run", {"teacher": str(files / "grouped"), "export.plain": True})
  with pytest.raises(ZedaError, match="1 of 2 groups of experts"):
    open_job(config)
  assert not (tmp_path / "run").exists()
