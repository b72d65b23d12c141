"""lm-eval's `local-completions` against `zeda serve`: its numbers are those of the model itself."""

import json

import numpy as np
import pytest

import zeda_jax
from zeda_jax.demo import generate_tasks

FAMILIES = ("math", "code", "instruction")
PER_FAMILY = 4
TEMPLATE = "<|im_start|>user{}<|im_end|><|im_start|>assistant"
SHARED = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}


def questions():
  """Short prompts with two choices, the right one sometimes first."""
  for family in FAMILIES:
    tasks = [task for task in generate_tasks(family, "held_out", 100) if len(task["prompt"][0]["content"]) < 22]
    for i, task in enumerate(tasks[:PER_FAMILY]):
      answers = [task["label"], task["label"][::-1] + "0"]
      choices = answers if i % 2 else answers[::-1]
      text = TEMPLATE.format(task["prompt"][0]["content"])
      yield {"question": text, "choices": choices, "gold": choices.index(task["label"]), "answer": task["label"]}


@pytest.fixture(scope="module")
def evaluated(server, model_path, tmp_path_factory):
  """(results of lm-eval, the questions)."""
  directory = tmp_path_factory.mktemp("lm_eval")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HF_DATASETS_CACHE", str(directory / "cache"))
    patch.setenv("OPENAI_API_KEY", "none")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    found = list(questions())
    file = directory / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in found))
    choose = {
      "task": "zeda_choose",
      "output_type": "multiple_choice",
      "doc_to_text": "{{question}}",
      "doc_to_choice": "{{choices}}",
      "doc_to_target": "{{gold}}",
      "target_delimiter": "",
    }
    write = {
      "task": "zeda_write",
      "output_type": "generate_until",
      "doc_to_text": "{{question}}",
      "doc_to_target": "{{answer}}",
      "generation_kwargs": {"until": ["7", "\n"], "max_gen_toks": 12},
      "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choose, write):
      task |= SHARED | {"dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(directory / "cache")}}
      (directory / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    results = lm_eval.simple_evaluate(
      model="local-completions",
      model_args={
        "model": "half",
        "base_url": f"{server.url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(model_path),
        "num_concurrent": 4,
        "batch_size": 2,
        "max_length": 1024,
      },
      tasks=["zeda_choose", "zeda_write"],
      task_manager=TaskManager(include_path=str(directory), include_defaults=False),
      bootstrap_iters=0,
      verbosity="ERROR",
    )
    return results, found


def test_loglikelihood(evaluated, logprobs_of, tokenizer):
  results, found = evaluated
  samples = sorted(results["samples"]["zeda_choose"], key=lambda sample: sample["doc_id"])
  assert len(samples) == len(found)
  right = []
  for sample, question in zip(samples, found, strict=True):
    sums = []
    for choice, response in zip(question["choices"], sample["filtered_resps"], strict=True):
      context = tokenizer(question["question"])["input_ids"]
      tokens = [*context, *tokenizer(choice)["input_ids"]]
      logprobs = logprobs_of(tokens)[len(context) - 1 : len(tokens) - 1]
      sums.append(logprobs[np.arange(len(logprobs)), tokens[len(context) :]].sum())
      is_greedy = bool((logprobs.argmax(axis=-1) == tokens[len(context) :]).all())
      assert response[0] == pytest.approx(sums[-1], abs=1e-3) and response[1] == is_greedy
    right.append(int(np.argmax(sums)) == question["gold"])
  assert results["results"]["zeda_choose"]["acc,none"] == pytest.approx(np.mean(right))
  assert np.mean(right) > 0.8


def test_generate_until(evaluated, model, tokenizer):
  results, found = evaluated
  prompts = [tokenizer(question["question"])["input_ids"] for question in found]
  answers = zeda_jax.generate(model, prompts, 12, temperature=0.0)
  texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
  expected = [text.split("7")[0].split("\n")[0] for text in texts]
  samples = sorted(results["samples"]["zeda_write"], key=lambda sample: sample["doc_id"])
  assert [sample["filtered_resps"][0] for sample in samples] == expected
  score = np.mean([text == question["answer"] for text, question in zip(expected, found, strict=True)])
  assert results["results"]["zeda_write"]["exact_match,none"] == pytest.approx(score)
  assert 0.2 < score < 1 and any("7" in text for text in texts)
