"""lm-eval's own evaluator on the engine, with a tiny task in files."""

import json

import jax
import numpy as np
import pytest

from tests.recipe_files import write_teacher
from tests.tiny_models import forward
from zeda_jax.checkpoint.transform import inject_directory
from zeda_jax.evaluate import harness
from zeda_jax.evaluate.harness import ZedaLM

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["ZZ"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  place = tmp_path_factory.mktemp("files")
  write_teacher(place / "teacher")
  inject_directory(place / "teacher", place / "student")
  return place / "student"


@pytest.fixture(scope="module")
def lm(directory):
  return ZedaLM(str(directory), batch_size=4)


def request(kind, *args):
  return harness.Instance(request_type=kind, doc={}, arguments=args, idx=0)


def logprobs(lm, tokens):
  """Of each token but the first, by a plain forward pass; and whether it is the most likely one."""
  row = np.zeros((1, 64), np.int32)
  row[0, : len(tokens)] = tokens
  table = np.asarray(jax.nn.log_softmax(forward(lm.model, row).logits[0, : len(tokens) - 1]), np.float64)
  return table[np.arange(len(tokens) - 1), tokens[1:]], table.argmax(axis=-1) == np.array(tokens[1:])


def greedy(lm, tokens, count):
  """The most likely continuation, by plain forward passes, up to a stop token."""
  tokens, length = list(tokens), len(tokens)
  while len(tokens) < length + count and (len(tokens) == length or tokens[-1] not in lm.stop_ids):
    row = np.zeros((1, 64), np.int32)
    row[0, : len(tokens)] = tokens
    tokens.append(int(np.asarray(forward(lm.model, row).logits)[0, len(tokens) - 1].argmax()))
  return tokens[length:]


def test_loglikelihoods(lm):
  pairs = [("What is", " a list"), ("A module", " of the library, in long words and many of them"), ("", "alone")]
  found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
  for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
    tokens = lm.tok_encode(context + continuation) if context else [lm.prefix_token_id, *lm.tok_encode(continuation)]
    skipped = len(lm.tok_encode(context)) - 1 if context else 0
    assert logprob == pytest.approx(logprobs(lm, tokens)[0][skipped:].sum(), rel=1e-4)
  context = lm.tok_encode("What is")
  best = greedy(lm, context, 3)
  other = [best[0], (best[1] + 1) % 400]
  (_, is_greedy), (_, is_not) = lm._loglikelihood_tokens([(None, context, best), (None, context, other)])
  assert (is_greedy, is_not) == (True, False)


def test_rolling_loglikelihood_of_a_text_longer_than_the_context(lm):
  text = "A list is a sequence of things, and a module is a file with definitions in it. " * 4
  tokens = [lm.prefix_token_id, *lm.tok_encode(text)]
  assert len(tokens) > lm.max_length
  (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
  windows = harness.get_rolling_token_windows(tokens[1:], tokens[0], lm.max_length, 1)
  parts = [(None, *harness.make_disjoint_window(window)) for window in windows]
  assert sum(len(part[2]) for part in parts) == len(tokens) - 1  # each token once
  assert found == pytest.approx(sum(value for value, _ in lm._loglikelihood_tokens(parts)), rel=1e-5)


def test_generation_stops_where_the_task_says(lm):
  prompts = ["What is a list?", "A module", "Explain: x"]
  whole = lm.generate_until([request("generate_until", p, {"max_gen_toks": 8}) for p in prompts])
  expected = [greedy(lm, lm.tok_encode(prompt), 8) for prompt in prompts]
  assert whole == [lm.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
  end = whole[0][2:4]
  cut = lm.generate_until([request("generate_until", prompts[0], {"max_gen_toks": 8, "until": [end]})])
  assert cut == [whole[0].split(end)[0]] and cut != whole[:1]
  settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
  drawn = lm.generate_until([request("generate_until", prompts[0], settings)] * 3)
  assert len(set(drawn)) > 1
  assert lm.generate_until([]) == []


def test_simple_evaluate(directory, lm, tmp_path, monkeypatch):
  lm_eval = pytest.importorskip("lm_eval")
  from lm_eval.tasks import TaskManager

  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  questions = ["What is a list?", "What is a module?", "What is a file?"]
  docs = []
  for question in questions:
    (text,) = lm.generate_until([request("generate_until", question, {"max_gen_toks": 6, "until": ["ZZ"]})])
    scores = lm.loglikelihood([request("loglikelihood", question, f" {c}") for c in ("yes", "no")], disable_tqdm=True)
    docs.append({"question": question, "choices": ["yes", "no"], "answer": int(np.argmax([s for s, _ in scores]))})
    docs[-1]["text"] = text
  docs[2]["answer"], docs[1]["text"] = 1 - docs[2]["answer"], "something else"
  data = tmp_path / "data.jsonl"
  data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
  for name, text in (("choice", CHOICE), ("generate", GENERATE)):
    (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", json.dumps(str(data))))
  found = lm_eval.simple_evaluate(
    model="zeda",
    model_args={"pretrained": str(directory), "batch_size": 4},
    tasks=["tiny_choice", "tiny_generate"],
    task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    bootstrap_iters=0,
  )["results"]
  assert found["tiny_choice"]["acc,none"] == pytest.approx(2 / 3)
  assert found["tiny_generate"]["exact_match,none"] == pytest.approx(2 / 3)


def test_chat_templates(lm):
  text = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
  assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  special = lm.tokenizer.convert_tokens_to_ids("<|im_start|>")
  assert lm.tok_encode(text)[0] == special and lm.tok_encode(text).count(special) == 2
