"""Baselines beside the recipe: what each variant is, and the whole comparison on a tiny teacher."""

import json

import numpy as np
import pytest
import rich.console

from tests import recipe_files
from zeda_jax.distill import compare as module
from zeda_jax.distill.compare import LABELS, VARIANTS, changed, compare
from zeda_jax.distill.job import open_job
from zeda_jax.errors import ZedaError

SHORT = {"sft.epochs": 1, "opd.steps": 1, "evaluate.num_prompts": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("files")
  recipe_files.write_teacher(directory / "teacher")
  recipe_files.write_prompts(directory / "prompts.jsonl", 60)
  return directory


def test_variants_differ_from_the_recipe_where_they_say(files, tmp_path):
  job = open_job(recipe_files.settings(files, tmp_path / "run", SHORT))
  top_k = job.model.num_experts_per_tok
  students = {
    name: job.student(changed(job, variant.changes).student)
    for name, variant in VARIANTS.items()
    if variant.changes is not None
  }
  assert students["truncated-trained"].config.num_experts_per_tok == top_k // 2
  assert not students["truncated-sft"].config.is_dynamic
  assert changed(job, VARIANTS["truncated-sft"].changes).opd.steps == 0
  assert students["copy"].config.zero_expert_type == "copy"
  assert students["renormalized"].config.renormalize and students["adamoe"].config.renormalize
  for name, balance in (("adamoe", "adamoe"), ("expert-balance", "expert"), ("copy", job.config.sft.balance)):
    config = changed(job, VARIANTS[name].changes)
    assert (config.sft.balance, config.opd.balance) == (balance, balance)
  for name in ("router", "adamoe", "expert-balance", "copy", "renormalized"):
    assert students[name].config.num_zero_experts == job.student().config.num_zero_experts
  for name in ("truncated", "halved"):
    assert VARIANTS[name].untrained(job).runs is not job.teacher.runs


@pytest.mark.parametrize(
  ("variants", "changes", "complaint"),
  [
    (["copy", "nonsense"], {}, "variant 'nonsense' is not known; expected some of truncated, halved"),
    (["copy"], {"evaluate.num_prompts": 0}, "no held-out prompts to compare on"),
  ],
)
def test_refused_before_any_work(files, tmp_path, variants, changes, complaint):
  with pytest.raises(ZedaError, match=complaint):
    compare(recipe_files.settings(files, tmp_path / "run", SHORT | changes), variants)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_table_of_all_and_nothing_twice(files, tmp_path, monkeypatch):
  config = recipe_files.settings(files, tmp_path / "run", SHORT)
  with open(tmp_path / "console.txt", "w") as out:
    workdir = compare(config, console=rich.console.Console(file=out))
  table = (workdir / "summary.md").read_text()
  rows = {name: json.loads((workdir / "evaluate" / f"{name}.json").read_text()) for name in LABELS}
  assert all(f"| {label} |" in table for label in LABELS.values())
  for name in ("truncated", "halved", "truncated-sft", "truncated-trained"):
    assert rows[name]["skipped"] == pytest.approx(0.5)
  assert rows["teacher"]["skipped"] == 0 and np.isfinite([row["skipped"] for row in rows.values()]).all()
  assert (workdir / "variants" / "copy" / "opd" / "finished.json").is_file()
  monkeypatch.setattr(module, "run_sft", lambda *_: pytest.fail("trained again"))
  with open(tmp_path / "console.txt", "w") as out:
    compare(config, console=rich.console.Console(file=out))
  assert (workdir / "summary.md").read_text() == table
