"""`zeda report` on a real tiny model (the demo's teacher, injected), and what it refuses."""

import itertools
import json
import shutil

import numpy as np
import pytest

from tests.recipe_files import everything
from tests.report import synthetic
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.cli import main as cli
from zeda_jax.data.jsonl import write_jsonl
from zeda_jax.demo.families import mixed_tasks
from zeda_jax.demo.run import TEACHER
from zeda_jax.distill.recipe import default_config
from zeda_jax.models.decoder import inject
from zeda_jax.rollout.generate import generate


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  save_hf(inject(load_hf(TEACHER)), folder / "student")
  write_jsonl(folder / "prompts.jsonl", mixed_tasks("held_out", 8))
  return folder


def flags(files, out, **changes):
  given = {"teacher": TEACHER, "student": files / "student", "prompts": files / "prompts.jsonl", "out": out}
  given |= {"max_new_tokens": 16, "temperature": 0, "batch_size": 24, "biases": "-inf,0.1", **changes}
  return ["report", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None)]


def workdir_of(files, directory):
  """What `zeda adapt` leaves, with its student in place."""
  workdir = synthetic.write_workdir(directory)
  shutil.copytree(files / "student", workdir / "student")
  config = default_config()
  config.update(teacher=str(TEACHER), prompts=str(files / "prompts.jsonl"), workdir=str(workdir))
  config.evaluate.update(num_prompts=10, max_new_tokens=16, batch_size=5)
  (workdir / "evaluate" / "config.json").write_text(json.dumps(config.to_dict()))
  return workdir


@pytest.fixture(scope="module")
def report(files):
  assert cli.main(flags(files, files / "report")) == 0
  return files / "report"


@pytest.mark.slow
def test_page_and_numbers(files, report):
  assert (report / "index.html").stat().st_size < 2**20
  found = json.loads((report / "report.json").read_text())
  assert [p["zero_expert_bias"] for p in found["dial"]] == ["-inf", "0", "0.1"]
  assert found["dial_is_monotone"]
  assert found["dial"][0]["r_ze_response"] == 0
  assert found["dial"][0]["accuracy"] > 0.9
  assert abs(found["dial"][0]["forward_kl"]) < 1e-6  # the injected model with its zero experts masked is its teacher
  graded = json.loads((report / "data" / "teacher.json").read_text())
  assert graded["average"] == found["dial"][0]["accuracy"]


@pytest.mark.slow
def test_ratio_is_that_of_generation(files, report):
  """r_ZE measured in one pass over the texts is the one counted while they were generated."""
  found = json.loads((report / "report.json").read_text())["dial"][1]
  student = load_hf(files / "student")
  with np.load(report / "data" / "tokens.npz", allow_pickle=False) as arrays:
    starts, lengths, tokens = arrays["starts"], arrays["prompt_lengths"], arrays["texts"].tolist()
  prompts = [tokens[s : s + n] for s, n in zip(starts, lengths, strict=False)]
  samples = generate(student, prompts, 16, temperature=0.0, batch_size=24)
  weights = [len(s.tokens) for s in samples]
  assert [p + s.tokens for p, s in zip(prompts, samples, strict=True)] == [
    tokens[a:b] for a, b in itertools.pairwise(starts)
  ]
  expected = np.average([s.zero_ratio for s in samples], weights=weights)
  assert found["r_ze_response"] == pytest.approx(expected, abs=1e-6)
  same = json.loads((report / "data" / "dial" / "0.json").read_text())["same_texts"]
  assert same["ratio_response"][0] == pytest.approx(expected, abs=2e-3)  # a tie may fall otherwise in another program


@pytest.mark.slow
def test_drawn_again_without_a_model(files, report, monkeypatch, capsys):
  monkeypatch.setattr("zeda_jax.analysis.subject.load_hf", lambda *_: pytest.fail("the models were read again"))
  page = (report / "index.html").read_bytes()
  (report / "index.html").unlink()
  assert cli.main(flags(files, report)) == 0
  assert (report / "index.html").read_bytes() == page
  assert f"report: {report / 'index.html'}" in capsys.readouterr().out


@pytest.mark.slow
def test_other_settings_want_another_directory(files, report, capsys):
  before = everything(report)
  assert cli.main(flags(files, report, seed=3)) == 2
  assert "was measured with seed 0, now it is 3: use another --out, or --overwrite" in capsys.readouterr().err
  assert everything(report) == before


def test_subject_of_a_workdir(files, tmp_path):
  from zeda_jax.analysis.subject import from_workdir

  workdir = workdir_of(files, tmp_path / "run")
  subject = from_workdir(workdir, changes={"max_new_tokens": 8, "top_p": None})
  assert subject.teacher_path == TEACHER
  assert len(subject.prompts) == 10  # held out of the prompts, as the recipe did it
  assert subject.answering.max_new_tokens == 8
  assert (subject.answering.temperature, subject.answering.batch_size) == (0.0, 5)
  assert len(from_workdir(workdir, num_prompts=4).prompts) == 4
  assert len(from_workdir(workdir, prompts=files / "prompts.jsonl").prompts) == 24


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"out": None}, "give the workdir of a finished"),
    ({"student": TEACHER}, "is a static model: a report is about one with zero experts"),
    ({"teacher": "STUDENT"}, "has zero experts; expected the static model"),
    ({"prompts": "missing.jsonl"}, "missing.jsonl"),
    ({"biases": "a,b"}, "--biases=a,b is no list of numbers; expected e.g. --biases=-inf,-1,0,1."),
    ({"biases": "0,inf"}, "--biases=0,inf is no list of numbers"),
    ({"grader": "best"}, "--grader is 'best'; expected one of exact, number."),
    ({"num_tokens": 0}, "--num-tokens is 0; expected at least 1."),
    ({"top_p": 0}, "--top-p is 0.0; expected more than 0 and at most 1."),
    ({"max_new_tokens": 4096}, "more than the context of 256: shorten it or lower --max-new-tokens."),
    ({"bench": "missing.csv"}, "missing.csv"),
  ],
)
def test_bad_input(files, tmp_path, capsys, change, message):
  change = {name: files / "student" if value == "STUDENT" else value for name, value in change.items()}
  assert cli.main(flags(files, **{"out": tmp_path / "out", **change})) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_bad_workdirs(files, tmp_path, capsys):
  def refused(*args):
    assert cli.main(["report", *map(str, args)]) == 2
    return capsys.readouterr().err

  assert "does not exist: give the workdir of a finished" in refused(tmp_path / "none")
  assert "holds no run of `zeda adapt` or `zeda demo` (no recipe.json)" in refused(tmp_path)
  workdir = workdir_of(files, tmp_path / "run")
  assert "leave out one of them" in refused(workdir, f"--student={files / 'student'}")
  assert "is not empty and holds no report of this command" in refused(workdir, f"--out={files}")
  config = workdir / "evaluate" / "config.json"
  config.write_text(config.read_text().replace(str(TEACHER), str(tmp_path / "moved")))
  assert f"was made with teacher {tmp_path / 'moved'}, which is gone: give its new place" in refused(workdir)
  config.unlink()
  assert "does not say where its teacher lies" in refused(workdir)
  (workdir / "student" / "config.json").unlink()
  assert "has no student/ yet" in refused(workdir)
