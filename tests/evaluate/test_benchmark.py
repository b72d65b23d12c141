"""`zeda evaluate` from a checkpoint and files to results, cut off and gone on with."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.recipe_files import REPOSITORY, write_teacher
from zeda_jax.checkpoint.transform import inject_directory
from zeda_jax.cli import main as cli
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate import benchmark, grading
from zeda_jax.evaluate.benchmark import Settings, run
from zeda_jax.evaluate.tasks import PLAIN, TASKS, Task, select, with_samples

TASK = Task("mine", "Mine", "exact", PLAIN, 3)
SETTINGS = Settings(max_new_tokens=8, batch_size=8, temperature=1.0, top_k=0, top_p=1.0, grade_workers=1)
NUM = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("files")
  write_teacher(directory / "teacher")
  inject_directory(directory / "teacher", directory / "student")
  for name in ("mine", "other"):
    lines = [json.dumps({"id": f"{name}{i}", "prompt": f"What is {i}?", "answer": str(i)}) for i in range(NUM)]
    (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
  return directory


def settings(files, **changes):
  return dataclasses.replace(SETTINGS, data=files, **changes)


def lines_of(output):
  return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
  """A run that nothing disturbed: its output and results."""
  output = tmp_path_factory.mktemp("whole") / "out"
  return output, run(files / "student", [TASK], output, settings(files))


def test_results(files, whole):
  output, results = whole
  lines = lines_of(output)
  assert [(s["id"], s["sample"]) for s in lines] == [(f"mine{i}", j) for i in range(NUM) for j in range(3)]
  assert json.loads((output / "results.json").read_text()) == results
  found = results["tasks"]["mine"]
  assert results["complete"] and found["num_graded"] == 15 and found["num_samples"] == 3
  assert found["mean"] == pytest.approx(np.mean([s["response"].strip() == s["id"][4:] for s in lines]))
  tokens = np.array([s["num_tokens"] for s in lines])
  zero = np.array([s["zero_ratio"] for s in lines])
  assert 0 < zero.mean() < 1 and len({s["response"] for s in lines}) > 10
  assert found["zero_ratio"]["response"] == pytest.approx(zero.mean())
  assert found["zero_ratio"]["token"] == pytest.approx((zero * tokens).sum() / tokens.sum())
  assert found["length"] == pytest.approx(tokens.mean())


def test_nothing_is_left_to_do(files, whole, monkeypatch):
  output, results = whole
  monkeypatch.setattr(benchmark, "open_engine", lambda *_: pytest.fail("the model is not needed"))
  before = (output / "samples.jsonl").read_bytes()
  again = run(files / "student", [TASK], output, settings(files))
  assert again == {key: value for key, value in results.items() if key != "seconds"}
  assert (output / "samples.jsonl").read_bytes() == before


def test_going_on_gives_the_same_responses(files, whole, tmp_path):
  class CutError(Exception):
    pass

  def cut(done, total):
    assert total == 15
    if done > 5:
      raise CutError

  with pytest.raises(CutError):
    run(files / "student", [TASK], tmp_path / "out", settings(files), progress=cut)
  with open(tmp_path / "out" / "samples.jsonl", "ab") as stream:
    stream.write(b'{"task":"mine","id":"mine4","sam')  # as a killed process leaves it
  kept = sum("response" in line for line in map(json.loads, _complete(tmp_path / "out" / "samples.jsonl")))
  assert 0 < kept < 15
  seen = []
  results = run(files / "student", [TASK], tmp_path / "out", settings(files), progress=lambda *now: seen.append(now))
  assert seen[0] == (kept, 15) and seen[-1] == (15, 15) and seen == sorted(seen)
  assert lines_of(tmp_path / "out") == lines_of(whole[0])
  assert results["tasks"] == whole[1]["tasks"]


def _complete(file):
  return file.read_bytes().rpartition(b"\n")[0].splitlines()


@pytest.mark.slow
def test_going_on_after_a_kill(files, tmp_path):
  """A real process, killed in the middle of its work."""
  output = tmp_path / "out"
  command = [
    "evaluate",
    str(files / "student"),
    "--tasks=gsm8k",
    f"--source=gsm8k={files / 'mine.jsonl'}",
    "--samples=150",
  ]
  command += [f"--output={output}", "--max-new-tokens=8", "--batch-size=8", "--temperature=1"]
  process = subprocess.Popen([sys.executable, "-m", "zeda_jax.cli.main", *command], cwd=REPOSITORY)
  try:
    deadline = time.monotonic() + 240
    while not (output / "samples.jsonl").is_file() or (output / "samples.jsonl").stat().st_size < 3000:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  finally:
    process.kill()
    process.wait()
  before = {(s["id"], s["sample"]): s for s in map(json.loads, _complete(output / "samples.jsonl")) if "response" in s}
  assert 0 < len(before) < NUM * 150 and not (output / "results.json").exists()
  assert cli.main(command) == 0
  after = {(s["id"], s["sample"]): s for s in lines_of(output)}
  assert len(after) == NUM * 150 and all(s["score"] is not None for s in after.values())
  assert all(after[key]["response"] == sample["response"] for key, sample in before.items())


def test_a_response_depends_on_nothing_but_seed_task_problem_and_sample(files, whole, tmp_path):
  other = dataclasses.replace(TASK, name="other", title="Other", samples=1)
  more = dataclasses.replace(TASK, samples=2)
  run(files / "student", [other, more], tmp_path / "out", settings(files, limit=3, batch_size=8))
  first = {(s["task"], s["id"], s["sample"]): s["response"] for s in lines_of(whole[0])}
  now = {(s["task"], s["id"], s["sample"]): s["response"] for s in lines_of(tmp_path / "out")}
  assert len(now) == 9 and all(response == first[key] for key, response in now.items() if key[0] == "mine")
  # the tasks, problems and samples that a run lacks are added to it
  results = run(files / "student", [TASK], tmp_path / "out", settings(files))
  assert list(results["tasks"]) == ["other", "mine"] and results["tasks"]["mine"]["num_graded"] == 15
  assert whole[1]["tasks"]["mine"] == results["tasks"]["mine"]
  assert results["average"]["mean"] == pytest.approx(np.mean([t["mean"] for t in results["tasks"].values()]))


def test_failures_are_counted_and_retried(files, whole, tmp_path, monkeypatch):
  once = grading.Graders._once

  def fails(self, grader, answer, response):
    if answer == "2":
      raise grading.GraderFailure("broken today")
    return once(self, grader, answer, response)

  with monkeypatch.context() as patch:
    patch.setattr(grading.Graders, "_once", fails)
    results = run(files / "student", [TASK], tmp_path / "out", settings(files))
  found = results["tasks"]["mine"]
  assert not results["complete"] and (found["num_failed"], found["num_graded"]) == (3, 12)
  failed = [s for s in lines_of(tmp_path / "out") if s["score"] is None]
  assert {(s["id"], s["failure"], s["attempts"]) for s in failed} == {("mine2", "broken today", 3)}
  monkeypatch.setattr(benchmark, "open_engine", lambda *_: pytest.fail("only grading is left"))
  results = run(files / "student", [TASK], tmp_path / "out", settings(files))
  assert results["tasks"] == whole[1]["tasks"] and results["complete"]


def test_without_its_zero_experts_the_student_is_the_teacher(files, tmp_path):
  greedy = {"temperature": 0.0, "limit": 2}
  one = dataclasses.replace(TASK, samples=1)
  run(files / "teacher", [one], tmp_path / "teacher", settings(files, **greedy))
  off = settings(files, **greedy, zero_expert_bias=-float("inf"))
  results = run(files / "student", [one], tmp_path / "student", off)
  texts = [[s["response"] for s in lines_of(tmp_path / name)] for name in ("teacher", "student")]
  assert texts[0] == texts[1] and results["average"]["zero_ratio"]["all"] == 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"temperature": 0.5}, "holds a run with temperature 1.0; this one has 0.5: use another --output"),
    ({"seed": 1}, "holds a run with seed 0"),
    ({"zero_expert_bias": 1.0}, "holds a run with zero_expert_bias '0.0'"),
  ],
)
def test_another_run_is_not_mixed_in(files, whole, changes, message):
  with pytest.raises(ZedaError, match=message):
    run(files / "student", [TASK], whole[0], settings(files, **changes))


def test_another_model_or_other_problems_are_not_mixed_in(files, whole, tmp_path):
  with pytest.raises(ZedaError, match="holds a run with checkpoint"):
    run(files / "teacher", [TASK], whole[0], settings(files))
  lines = [json.dumps({"id": f"mine{i}", "prompt": f"What is {i}?", "answer": "x"}) for i in range(NUM)]
  (tmp_path / "mine.jsonl").write_text("\n".join(lines))
  with pytest.raises(ZedaError, match="problem mine0 of mine was another one"):
    run(files / "student", [TASK], whole[0], settings(tmp_path))
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.txt").write_text("mine")
  with pytest.raises(ZedaError, match="is not empty and holds no run"):
    run(files / "student", [TASK], tmp_path / "full", settings(files))


def test_room_for_the_answer(files, tmp_path):
  with pytest.raises(
    ZedaError, match=r"mine, problem mine0: the prompt has .* context of 96 .* lower --max-new-tokens"
  ):
    run(files / "student", [TASK], tmp_path / "out", settings(files, max_new_tokens=96))
  assert not (tmp_path / "out").exists()
  plan = benchmark.make_plan(files / "student", [TASK], tmp_path / "out", settings(files, max_new_tokens=None))
  plan.log.close()
  assert all(item.max_new_tokens == 96 - len(item.prompt) for item in plan.items)


def test_reasoning_that_the_template_opens_is_not_graded(files, tmp_path):
  template = files / "thinking"
  write_teacher(template)
  jinja = template / "chat_template.jinja"
  jinja.write_text(jinja.read_text().replace("assistant\n", "assistant\n<think>\n"))
  plan = benchmark.make_plan(template, [TASK], tmp_path / "out", settings(files))
  plan.log.close()
  assert all(item.opens_reasoning for item in plan.items)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"limit": 0}, "limit is 0"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"temperature": -1.0}, "temperature is -1"),
    ({"seed": -1}, "seed is -1"),
    ({"zero_expert_bias": float("nan")}, "zero_expert_bias is NaN"),
  ],
)
def test_settings_out_of_range(changes, message):
  with pytest.raises(ZedaError, match=message):
    dataclasses.replace(SETTINGS, **changes)


def test_the_papers_protocol():
  samples = {task.name: task.samples for task in select("paper")}
  assert samples == {
    **dict.fromkeys(("aime24", "aime25", "aime26"), 32),
    **dict.fromkeys(("humaneval_plus", "mbpp_plus", "livecodebench_v5", "livecodebench_v6"), 8),
    **dict.fromkeys(("gsm8k", "math500", "ifeval", "ifbench", "gpqa_diamond", "mmlu_redux"), 1),
  }
  assert (Settings().top_p, Settings().top_k, benchmark.tasks.TEMPERATURE) == (0.95, 20, 0.6)
  assert benchmark.tasks.MAX_NEW_TOKENS == 38912


def test_names_of_tasks():
  assert [task.name for task in select("AIME-24, HumanEval+,MATH500,demo")] == [
    *("aime24", "humaneval_plus", "math500"),
    *("demo_math", "demo_code", "demo_instruction"),
  ]
  with pytest.raises(ZedaError, match=r"task 'aime' is unknown; expected some of gsm8k"):
    select("aime")
  with pytest.raises(ZedaError, match="no task is given"):
    select(",")
  changed = with_samples(select("aime24,gsm8k"), "2,aime24=4")
  assert [task.samples for task in changed] == [4, 2] and TASKS["aime24"].samples == 32
  for bad, message in (("0", "no number of at least 1"), ("x=1", "x is not among the tasks"), ("a=b", "no number")):
    with pytest.raises(ZedaError, match=message):
      with_samples(select("gsm8k"), bad)
