"""Rollouts from a server as `zeda rollout` runs them: stopped, killed, in several processes, from `zeda serve`."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.multiprocess import start
from tests.recipe_files import REPOSITORY, arguments, everything, settings, write_teacher, zeda
from tests.rollout.openai_stub import Stub, serving
from tests.rollout.test_openai import contents, records_of
from tests.serve.server_process import Server
from zeda_jax.data import chat
from zeda_jax.data.jsonl import write_jsonl
from zeda_jax.demo import TEACHER, mixed_tasks
from zeda_jax.distill.adapt import adapt
from zeda_jax.distill.trainer import StoppedEarly
from zeda_jax.rollout.stage import is_finished


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("files")
  write_teacher(directory / "teacher")
  write_jsonl(directory / "prompts.jsonl", ({"prompt": f"Explain {n}."} for n in range(40)))
  return directory


@pytest.fixture
def teacher_stub(files):
  return Stub(chat.load_tokenizer(files / "teacher"))


def server_settings(url):
  return {"rollout.engine": "openai", "rollout.url": url, "rollout.shard_size": 8, "evaluate.num_prompts": 8}


def test_the_recipe_stops_on_a_signal_and_goes_on(files, teacher_stub, tmp_path, capsys):
  with serving(teacher_stub) as url:
    changes = server_settings(url) | {"rollout.concurrency": 4}
    adapt(settings(files, tmp_path / "whole", changes), until="rollout")
    assert "model teacher (vllm); token ids come from the server; log-probs kept" in capsys.readouterr().out
    number, teacher_stub.delay = len(teacher_stub.requests), 0.02

    def fault(n, body):
      if n == number + 20:
        os.kill(os.getpid(), signal.SIGTERM)

    teacher_stub.fault = fault
    with pytest.raises(StoppedEarly, match=r"stopped with \d+ of 32 prompts answered"):
      adapt(settings(files, tmp_path / "w", changes), until="rollout")
    assert 0 < len(contents(tmp_path / "w" / "rollouts")) < 4
    teacher_stub.fault = lambda n, body: None
  with serving(teacher_stub) as url:  # elsewhere now
    adapt(settings(files, tmp_path / "w", server_settings(url) | {"rollout.concurrency": 16}), until="rollout")
  assert contents(tmp_path / "w" / "rollouts") == contents(tmp_path / "whole" / "rollouts")
  assert [r["index"] for r in records_of(tmp_path / "w" / "rollouts")] == sorted(
    r["index"] for r in records_of(tmp_path / "whole" / "rollouts")
  )


@pytest.mark.slow
def test_the_embedded_teacher_behind_zeda_serve_answers_as_it_does_here(tmp_path):
  """`zeda rollout` on the demo's teacher, greedily: the same records from `zeda serve` as from the engine."""
  write_jsonl(
    tmp_path / "prompts.jsonl", ({"prompt": t["prompt"], "label": t["label"]} for t in mixed_tasks("train", 16))
  )
  flags = [f"--config.teacher={TEACHER}", f"--config.prompts={tmp_path / 'prompts.jsonl'}", "--config.seed=0"]
  flags += ["--config.rollout.max_new_tokens=16", "--config.rollout.temperature=0", "--config.evaluate.num_prompts=8"]
  command = ["rollout", f"--config={REPOSITORY / 'configs' / 'tiny.py'}", *flags]
  here = zeda(*command, f"--config.workdir={tmp_path / 'here'}")
  assert (here.returncode, here.stderr) == (0, "")
  with Server(TEACHER, "--model-name=teacher", "--warmup-length=0", "--api-key=sesame") as server:
    there = [f"--config.workdir={tmp_path / 'there'}", "--config.rollout.engine=openai"]
    there += [f"--config.rollout.url={server.url}", "--config.rollout.key_variable=SERVE_KEY"]
    done = zeda(*command, *there, SERVE_KEY="sesame")
  assert (done.returncode, done.stderr) == (0, "")
  assert "model teacher (zeda-jax); token ids come from the server; log-probs kept" in done.stdout
  assert "left out" not in done.stdout
  ours, theirs = (records_of(tmp_path / name / "rollouts") for name in ("here", "there"))
  assert len(ours) == 40 and any(r["finished"] for r in ours)
  for mine, other in zip(ours, theirs, strict=True):
    assert other["logprobs"] == pytest.approx(mine["logprobs"], abs=1e-4)
    assert other | {"logprobs": None} == mine | {"logprobs": None}


@pytest.mark.slow
def test_killed_it_goes_on(files, teacher_stub, tmp_path):
  """`zeda rollout` in processes of its own: one killed, one told to stop, one that ends."""
  teacher_stub.delay = 0.2
  with serving(teacher_stub) as url:
    flags = [*arguments(files, tmp_path / "w", **server_settings(url)), "--config.rollout.concurrency=2"]
    command = [sys.executable, "-m", "zeda_jax.cli.main", "rollout", *flags]
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 0)):
      before = len(teacher_stub.sampled)
      process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      while len(teacher_stub.sampled) < before + 13 and process.poll() is None:
        time.sleep(0.01)
      process.send_signal(number)
      out, err = process.communicate(timeout=60)
      assert (process.returncode, err) == (status, "")
    assert "run the same command again to go on" in out
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    adapt(settings(files, tmp_path / "whole", server_settings(url)), until="rollout")
  assert contents(tmp_path / "w" / "rollouts") == contents(tmp_path / "whole" / "rollouts")
  assert not [name for name in everything(tmp_path / "w") if "partial" in name]


WORKER = """
import pathlib, sys
from zeda_jax import distributed
distributed.initialize()
from tests.rollout import test_openai as test
from zeda_jax.data import chat
from zeda_jax.data.prompts import open_prompts
from zeda_jax.rollout.openai import sample_from_server
from zeda_jax.rollout.openai_answers import Verifier
url, directory, files = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
tokenizer = chat.load_tokenizer(files / "teacher")
verifier = Verifier(tokenizer, 400, (tokenizer.eos_token_id,))
prompts = open_prompts(files / "prompts.jsonl")
sample_from_server(verifier, prompts, test.CHOSEN, test.render, 3, directory, test.rollout(url, retries=0), 0)
print("done", distributed.is_primary())
"""


@pytest.mark.slow
def test_of_two_processes_one_asks(files, teacher_stub, tmp_path):
  with serving(teacher_stub) as url:
    command = [sys.executable, "-c", WORKER, url, str(tmp_path / "r"), str(files)]
    with start(command, num_processes=2, devices=1) as group:
      results = group.wait(120)
    assert [r.status for r in results] == [0, 0], [r.output for r in results]
    assert len(teacher_stub.sampled) == 17 and is_finished(tmp_path / "r", 17, 6)
    # What fails in the one fails in both, with a sentence.
    teacher_stub.fault = lambda number, body: (403, {})
    command[-2] = str(tmp_path / "other")
    with start(command, num_processes=2, devices=1) as group:
      results = group.wait(120)
    assert all(r.status != 0 and "refuses the request: status 403" in r.output for r in results)
