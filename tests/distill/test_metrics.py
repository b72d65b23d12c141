"""The metric files: exact once-per-step rows through resumes, broken lines, new columns."""

import csv
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tensorboardX.proto.event_pb2 import Event

from zeda_jax.distill.metrics import MetricWriter, flatten_metrics
from zeda_jax.errors import ZedaError


def writer(directory, **options):
  console = options.pop("console", None) or rich.console.Console(file=io.StringIO(), force_terminal=False)
  return MetricWriter(directory, console=console, tensorboard=options.pop("tensorboard", False), **options)


def write_steps(directory, start, stop, num_steps=100, **options):
  w = writer(directory, **options)
  w.start(start, num_steps)
  for step in range(start + 1, stop + 1):
    w.write(step, {"loss": 1 / step, "zero_ratio": {"layer": np.array([0.25, step / 100])}})
  return w


def read_csv(directory):
  return list(csv.DictReader(io.StringIO((directory / "metrics.csv").read_text())))


def read_jsonl(directory):
  return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_flatten():
  flat = flatten_metrics(
    {"loss": jnp.float32(0.5), "tokens": jnp.int32(7), "zero_ratio": {"all": 0.5, "layer": jnp.array([0.25, 0.75])}}
  )
  assert flat == {
    "loss": 0.5,
    "tokens": 7,
    "zero_ratio/all": 0.5,
    "zero_ratio/layer_00": 0.25,
    "zero_ratio/layer_01": 0.75,
  }
  assert isinstance(flat["tokens"], int)
  with pytest.raises(ValueError, match=r"metric a/b has shape \(2, 2\)"):
    flatten_metrics({"a": {"b": np.zeros((2, 2))}})


def test_rows_are_on_disk_at_once(tmp_path):
  write_steps(tmp_path, 0, 3)  # not closed
  assert read_csv(tmp_path)[2] == {
    "step": "3",
    "loss": "0.333333333",
    "zero_ratio/layer_00": "0.25",
    "zero_ratio/layer_01": "0.03",
  }
  assert read_jsonl(tmp_path)[2] == {"step": 3, "loss": 1 / 3, "zero_ratio/layer_00": 0.25, "zero_ratio/layer_01": 0.03}


def test_resume_drops_later_rows_and_broken_lines(tmp_path):
  write_steps(tmp_path, 0, 7)
  for name, broken in (("metrics.csv", "8,0.1"), ("metrics.jsonl", '{"step": 8, "lo')):
    with (tmp_path / name).open("a") as file:
      file.write(broken)
  write_steps(tmp_path, 4, 9)
  assert [int(row["step"]) for row in read_csv(tmp_path)] == list(range(1, 10))
  assert [row["step"] for row in read_jsonl(tmp_path)] == list(range(1, 10))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


@pytest.mark.parametrize("broken", ["step,lo", "step,loss\n", "step,loss\n1,0.5", ""])
def test_resume_after_a_kill_in_the_first_row(tmp_path, broken):
  (tmp_path / "metrics.csv").write_text(broken)
  (tmp_path / "metrics.jsonl").write_text('{"st')
  write_steps(tmp_path, 0, 2)
  assert [row["step"] for row in read_csv(tmp_path)] == ["1", "2"]
  assert [float(row["loss"]) for row in read_csv(tmp_path)] == [1.0, 0.5]
  assert [row["step"] for row in read_jsonl(tmp_path)] == [1, 2]


def test_new_metrics_widen_the_table(tmp_path):
  w = writer(tmp_path)
  w.start(0, 10)
  w.write(1, {"loss": 1.0})
  w.write(2, {"loss": 2.0, "evaluation/accuracy": 0.5})
  w.write(3, {"loss": 3.0})
  w.close()
  assert [list(row.values()) for row in read_csv(tmp_path)] == [["1", "1", ""], ["2", "2", "0.5"], ["3", "3", ""]]


def test_nan_is_valid_json(tmp_path):
  w = writer(tmp_path)
  w.start(0, 10)
  w.write(1, {"loss": float("nan"), "kl": float("inf")})
  assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
    "step": 1,
    "loss": None,
    "kl": None,
  }
  assert read_csv(tmp_path) == [{"step": "1", "loss": "nan", "kl": "inf"}]


def test_unwritable_file_is_a_sentence(tmp_path):
  w = write_steps(tmp_path, 0, 1)
  (tmp_path / "metrics.csv").unlink()
  (tmp_path / "metrics.csv").mkdir()
  with pytest.raises(ZedaError, match=f"cannot write the metrics of step 2 in {tmp_path} "):
    w.write(2, {"loss": 1.0, "zero_ratio": {"layer": np.zeros(2)}})


def read_events(directory):
  """(step, tag, value) of all scalars; a TFRecord is length (8 bytes), checksum (4), payload, checksum (4)."""
  found = []
  for path in directory.glob("events.*"):
    data, at = path.read_bytes(), 0
    while at < len(data):
      length = int.from_bytes(data[at : at + 8], "little")
      event = Event.FromString(data[at + 12 : at + 12 + length])
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      at += 16 + length
  return found


def test_tensorboard_has_nested_scalars(tmp_path):
  write_steps(tmp_path, 0, 2, tensorboard=True).close()
  found = read_events(tmp_path / "tensorboard")
  assert {tag for _, tag, _ in found} == {"loss", "zero_ratio/layer_00", "zero_ratio/layer_01"}
  assert (2, "loss", 0.5) in found
  assert len(found) == 6


def test_plain_lines_without_a_terminal(tmp_path):
  stream = io.StringIO()
  w = writer(None, console=rich.console.Console(file=stream, force_terminal=False), label="sft")
  w.start(0, 100)
  for step in range(1, 101):
    w.write(step, {"loss": 0.5, "zero_ratio": 0.51, "learning_rate": 2e-5, "tokens_per_second": 12345.0}, 100.0 - step)
  lines = stream.getvalue().splitlines()
  assert 10 <= len(lines) <= 12
  assert lines[0] == "sft 1/100  loss 0.5000  r_ZE 0.510  lr 2.00e-05  tok/s 12,345  1m 39s left"
  assert lines[-1].startswith("sft 100/100 ")
  assert list(tmp_path.iterdir()) == []


def test_bar_on_a_terminal():
  stream = io.StringIO()
  w = writer(None, console=rich.console.Console(file=stream, force_terminal=True, width=120), label="opd")
  w.start(2, 4)
  w.write(3, {"loss": 0.25})
  w.write(4, {"loss": 0.125})
  w.close()
  assert "opd" in stream.getvalue()
  assert "4/4" in stream.getvalue()
  assert "loss 0.1250" in stream.getvalue()
