import json
import os
import pickle
import subprocess
import sys

import pytest
from array_record.python import array_record_module

from zeda_jax.data import prompts, records, rollouts
from zeda_jax.errors import ZedaError


@pytest.fixture(scope="module")
def builder():
  from zeda_jax.data import builder

  return builder


def write(path, lines):
  path.write_text("".join(line + "\n" for line in lines))
  return path


def build(builder, source, data_dir, **options):
  made = builder.JsonRecords(source=source, data_dir=data_dir, **options)
  made.download_and_prepare()
  return made


def test_prompts_become_array_record_and_come_back_in_order(builder, tmp_path):
  lines = [json.dumps({"prompt": f"é {i}", "label": i}) for i in range(50)]
  source = write(tmp_path / "p.jsonl", ["", *lines])
  made = build(builder, source, tmp_path / "tfds", max_split_bytes=600)
  data = prompts.open_prompts(made.data_dir)
  assert list(data) == [json.loads(line) for line in lines]
  assert pickle.loads(pickle.dumps(data))[17] == {"prompt": "é 17", "label": 17}
  assert data.location(17) == f"{source}:19"  # the line it was built from
  assert len(made.info.splits) > 2  # so that no split needs more memory than allowed
  view = made.as_data_source(split="all")
  assert [json.loads(view[i]["json"])["label"] for i in range(50)] == list(range(50))


def test_rollouts_become_array_record(builder, tmp_path):
  made = [rollouts.make_record({}, i, [1] * (i + 1), [2, 3], [-0.5, -1.0]) for i in range(5)]
  rollouts.write_shard(tmp_path / "in", 0, 1, made)
  written = build(builder, tmp_path / "in" / "*.jsonl", tmp_path / "tfds")
  plain, packed = rollouts.RolloutSource(tmp_path / "in"), rollouts.RolloutSource(written.data_dir)
  assert packed.lengths().tolist() == plain.lengths().tolist() == [3, 4, 5, 6, 7]
  for i in range(5):
    assert packed[i].keys() == plain[i].keys()
    assert packed[i]["prompt_tokens"].tolist() == plain[i]["prompt_tokens"].tolist() == [1] * (i + 1)
    assert packed[i]["logprobs"].tolist() == [-0.5, -1.0]


def test_a_broken_line_stops_the_building(builder, tmp_path):
  source = write(tmp_path / "p.jsonl", ['{"prompt": "x"}', '{"prompt": '])
  with pytest.raises(ZedaError, match=r"p\.jsonl:2: broken JSON"):
    build(builder, source, tmp_path / "tfds")
  assert not list((tmp_path / "tfds").rglob("*array_record*"))


def test_a_bad_prompt_in_array_record_is_named_by_its_line(builder, tmp_path):
  source = write(tmp_path / "p.jsonl", ['{"prompt": "x"}', '{"text": "x"}'])
  made = build(builder, source, tmp_path / "tfds")
  with pytest.raises(ZedaError, match=r"p\.jsonl:2: neither 'prompt' nor 'messages'"):
    prompts.open_prompts(made.data_dir)


def test_tensorflow_is_not_needed(tmp_path):
  write(tmp_path / "p.jsonl", ['{"prompt": "x"}'])
  code = (
    "import sys\n"
    "from zeda_jax.data import builder, prompts\n"
    "made = builder.JsonRecords(source=sys.argv[1] + '/p.jsonl', data_dir=sys.argv[1] + '/tfds')\n"
    "made.download_and_prepare()\n"
    "assert prompts.open_prompts(made.data_dir)[0] == {'prompt': 'x'}\n"
    "assert 'tensorflow' not in sys.modules"
  )
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": root}, check=True)


def write_payloads(path, *payloads):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for payload in payloads:
    writer.write(payload)
  writer.close()
  return path


def test_payloads_of_plain_json_are_read_too(tmp_path):
  path = write_payloads(tmp_path / "p.array_record", b'{"prompt": "a"}', b'{"prompt": ', b"\x00\x01garbage")
  data = records.open_records(path)
  assert len(data) == 3 and data[0] == {"prompt": "a"}
  with pytest.raises(ZedaError, match=r"p\.array_record, record 1: broken JSON"):
    data[1]
  with pytest.raises(ZedaError, match=r"p\.array_record, record 2: neither a JSON object nor"):
    data[2]
  with pytest.raises(IndexError):
    data[3]


def test_damaged_empty_and_mixed_files_are_sentences(tmp_path):
  (tmp_path / "bad.array_record").write_bytes(b"no such format" * 100)
  with pytest.raises(ZedaError, match="not readable as array_record"):
    records.open_records(tmp_path / "bad.array_record")
  write_payloads(tmp_path / "empty.array_record")
  with pytest.raises(ZedaError, match="is empty"):
    records.open_records(tmp_path / "empty.array_record")
  good = write_payloads(tmp_path / "a.array_record", b"{}")
  with pytest.raises(ZedaError, match="mix JSONL with array_record"):
    records.open_records([good, write(tmp_path / "b.jsonl", ["{}"])])
