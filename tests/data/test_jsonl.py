import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeda_jax.data import jsonl
from zeda_jax.errors import ZedaError

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3))


@settings(max_examples=40, deadline=None)
@given(
  records=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=12),
  blanks=st.lists(st.sampled_from(["", "\n", "  \t\n", "\r\n"]), min_size=13, max_size=13),
  ending=st.sampled_from(["\n", "\r\n"]),
  last_line_ends=st.booleans(),
  byte_order_mark=st.booleans(),
)
def test_reads_what_was_written_with_its_line(
  tmp_path_factory, records, blanks, ending, last_line_ends, byte_order_mark
):
  text, lines = "", []
  for blank, record in zip(blanks, records, strict=False):
    text += blank
    lines.append(text.count("\n") + 1)
    text += json.dumps(record, ensure_ascii=False).encode("utf-8", "replace").decode() + ending
  text += blanks[-1]
  text = text if last_line_ends else text.rstrip("\r\n")
  expected = [json.loads(line) for line in text.split("\n") if line.strip()]
  path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
  path.write_bytes((b"\xef\xbb\xbf" if byte_order_mark else b"") + text.encode())
  data = jsonl.JsonLines(path)
  assert [data[i] for i in range(len(data))] == expected == list(data)
  assert [data.location(i) for i in range(len(data))] == [f"{path}:{line}" for line in lines]


def test_many_files_are_one_sequence_that_survives_pickling(tmp_path):
  for name, values in {"b.jsonl": [2, 3], "a.jsonl": [0, 1], "c.jsonl": [4]}.items():
    (tmp_path / name).write_text("".join(f'{{"v": {v}}}\n' for v in values))
  data = pickle.loads(pickle.dumps(jsonl.JsonLines(tmp_path / "*.jsonl")))
  assert [record["v"] for record in data] == [0, 1, 2, 3, 4]
  assert [data[i]["v"] for i in reversed(range(5))] == [4, 3, 2, 1, 0]
  assert data.location(3) == f"{tmp_path}/b.jsonl:2"
  assert jsonl.JsonLines([tmp_path / "c.jsonl", tmp_path / "a.jsonl"])[0] == {"v": 4}
  for index in (5, -1):
    with pytest.raises(IndexError):
      data[index]


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    (b'{"a": 1', "broken JSON"),
    (b"[1]", "found a list"),
    (b"3", "found a number"),
    (b'{"a": "\xff"}', "not UTF-8"),
    (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
    (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "cannot be read"),
  ],
)
def test_a_broken_line_is_named(tmp_path, line, reason):
  path = tmp_path / "x.jsonl"
  path.write_bytes(b'{"a": 0}\n\n' + line + b"\n")
  data = jsonl.JsonLines(path)
  assert data[0] == {"a": 0}
  for read in (lambda: data[1], lambda: list(data)):
    with pytest.raises(ZedaError, match=reason) as error:
      read()
    assert str(error.value).startswith(f"{path}:3: ")


def test_missing_and_empty_files_are_named(tmp_path):
  (tmp_path / "empty.jsonl").write_text("\n \n")
  (tmp_path / "x[1].jsonl").write_text("{}\n")
  with pytest.raises(ZedaError, match=r"empty\.jsonl is empty"):
    jsonl.JsonLines(tmp_path / "empty.jsonl")
  with pytest.raises(ZedaError, match="matches no file"):
    jsonl.JsonLines(tmp_path / "no-*.jsonl")
  with pytest.raises(ZedaError, match="listed twice"):
    jsonl.JsonLines([tmp_path / "x[1].jsonl", tmp_path / "x*.jsonl"])
  assert len(jsonl.JsonLines(tmp_path / "x[1].jsonl")) == 1


def test_a_file_that_shrinks_while_read_is_an_error(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text('{"a": 0}\n{"a": 1}\n')
  data = jsonl.JsonLines(path)
  path.write_text('{"a": 0}\n')
  with pytest.raises(ZedaError, match="became shorter"):
    data[1]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "x.jsonl"
  assert jsonl.write_jsonl(path, [{"a": "é\ud800"}]) == 1
  before = path.read_bytes()
  assert jsonl.JsonLines(path)[0] == {"a": "é\ud800"}

  def broken():
    yield {"a": 1}
    raise RuntimeError("sampling failed")

  with pytest.raises(RuntimeError, match="sampling failed"):
    jsonl.write_jsonl(path, broken(), overwrite=True)
  with pytest.raises(ValueError, match="JSON compliant"):
    jsonl.write_jsonl(path, [{"a": float("nan")}], overwrite=True)
  with pytest.raises(ZedaError, match="already exists"):
    jsonl.write_jsonl(path, [])
  assert os.listdir(tmp_path) == ["x.jsonl"] and path.read_bytes() == before
  jsonl.write_jsonl(path, [{"a": 2}], overwrite=True)
  assert path.read_text() == '{"a":2}\n'


def test_no_space_left_is_a_sentence_and_leaves_nothing(tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the write fails as on a full disk
  try:
    with pytest.raises(ZedaError, match="no space left"):
      jsonl.write_jsonl(tmp_path / "x.jsonl", ({"a": "x" * 1000} for _ in range(1000)))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_target_and_the_next_one_succeeds(tmp_path):
  path = tmp_path / "x.jsonl"
  code = (
    "import sys, time; from zeda_jax.data import jsonl\n"
    "def slow():\n  for i in range(10**6): yield {'i': i, 'pad': 'x' * 10_000}; time.sleep(0.001)\n"
    "jsonl.write_jsonl(sys.argv[1], slow())"
  )
  process = subprocess.Popen([sys.executable, "-c", code, str(path)])
  deadline = time.monotonic() + 60
  while not any(file.stat().st_size for file in tmp_path.iterdir()) and time.monotonic() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert any(tmp_path.iterdir()) and not path.exists()
  jsonl.write_jsonl(path, [{"i": 0}])
  assert os.listdir(tmp_path) == ["x.jsonl"] and path.read_text() == '{"i":0}\n'
