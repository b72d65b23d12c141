"""The log of samples: nothing finished is lost, whatever cuts it off."""

import json
import pathlib
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.samples import SampleLog, key_of, read_samples


def line(sample, **rest):
  return {"task": "t", "id": "p", "sample": sample, **rest}


def test_lines_of_one_sample_are_merged(tmp_path):
  with SampleLog(tmp_path / "samples.jsonl") as log:
    log.add(line(0, response="a\n\u2028\ud800"))
    log.add(line(1, response="b"))
    log.add(line(0, score=1.0))
  with SampleLog(tmp_path / "samples.jsonl") as log:
    assert log.samples["t", "p", 0] == line(0, response="a\n\u2028\ud800", score=1.0)
    assert [s["sample"] for s in log.of_task("t")] == [0, 1] and log.of_task("u") == []


def test_compacting_orders_and_keeps_what_is_not_named(tmp_path):
  file = tmp_path / "samples.jsonl"
  with SampleLog(file) as log:
    for sample in (2, 0, 1):
      log.add(line(sample, response=str(sample)))
      log.add(line(sample, score=0.0))
    log.compact([("t", "p", 0), ("t", "p", 1), ("t", "q", 0)])
  lines = [json.loads(text) for text in file.read_text().splitlines()]
  assert lines == [line(i, response=str(i), score=0.0) for i in (0, 1, 2)]


def test_a_broken_line_in_the_middle_is_an_error_and_nothing_is_cut(tmp_path):
  file = tmp_path / "samples.jsonl"
  file.write_text(json.dumps(line(0)) + "\n{broken\n" + json.dumps(line(1)) + "\n")
  before = file.read_bytes()
  with pytest.raises(ZedaError, match=r"samples\.jsonl:2: broken JSON"):
    SampleLog(file)
  assert file.read_bytes() == before


def test_only_one_run_at_a_time(tmp_path):
  with SampleLog(tmp_path / "s.jsonl"), pytest.raises(ZedaError, match="another process"):
    SampleLog(tmp_path / "s.jsonl")
  SampleLog(tmp_path / "s.jsonl").close()


def test_a_line_without_a_key_is_refused(tmp_path):
  with pytest.raises(ZedaError, match="expected 'task' and 'id'"):
    key_of({"task": "t", "sample": 0})


RECORDS = st.lists(
  st.builds(line, st.integers(0, 3), response=st.text(max_size=12), score=st.none() | st.sampled_from([0.0, 1.0])),
  max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(RECORDS, RECORDS, st.data())
def test_a_file_cut_anywhere_keeps_its_complete_lines_and_goes_on(first, second, data):
  with tempfile.TemporaryDirectory() as name:
    file = pathlib.Path(name, "samples.jsonl")
    with SampleLog(file) as log:
      for record in first:
        log.add(record)
    written = file.read_bytes()
    cut = data.draw(st.integers(0, len(written)))
    file.write_bytes(written[:cut])
    kept = written[:cut].count(b"\n")
    with SampleLog(file) as log:
      for record in second:
        log.add(record)
    expected = {}
    for record in [*first[:kept], *second]:
      key = key_of(record)
      expected[key] = expected.get(key, {}) | record
    assert read_samples(file)[0] == expected
