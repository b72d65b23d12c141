"""`zeda adapt` and `zeda report` on what it left, as commands; the page in a browser."""

import json

import pytest

from tests.recipe_files import arguments, write_prompts, write_teacher, zeda
from tests.report import browser


@pytest.mark.slow
def test_from_a_recipe_to_its_page(tmp_path):
  write_teacher(tmp_path / "teacher")
  write_prompts(tmp_path / "prompts.jsonl")
  workdir = tmp_path / "run"
  adapted = zeda("adapt", *arguments(tmp_path, workdir))
  assert adapted.returncode == 0, adapted.stderr
  reported = zeda("report", workdir)
  assert reported.returncode == 0, reported.stderr
  page = workdir / "report" / "index.html"
  assert f"report: {page}" in reported.stdout
  found = json.loads((workdir / "report" / "report.json").read_text())
  assert found["dial_is_monotone"]
  assert len(found["dial"]) >= 5
  assert {line["measure"] for line in found["correlations"]} == {"entropy", "gap", "reverse_kl"}
  before = page.read_bytes()
  again = zeda("adapt", *arguments(tmp_path, workdir))  # the report in its workdir is no obstacle
  assert again.returncode == 0, again.stderr
  assert page.read_bytes() == before
  if browser.find():
    seen = browser.look(browser.find(), page, tmp_path, 390, dark=True)
    assert not seen.console and not seen.report["problems"] and not seen.report["wide"]
