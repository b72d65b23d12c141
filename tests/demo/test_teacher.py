"""The shipped teacher: small, loaded alike by stock transformers and by us, and right on held-out prompts."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.demo import FAMILIES, TEACHER, generate_tasks, grade, train_teacher
from zeda_jax.demo.tokenizer import save_tokenizer

torch = pytest.importorskip("torch")
PROMPTS = 60


@pytest.fixture(scope="module")
def stock():
  from transformers import AutoModelForCausalLM, AutoTokenizer

  return AutoModelForCausalLM.from_pretrained(TEACHER).eval(), AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def ours():
  return nnx.split(load_hf(TEACHER))


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, graphdef, batch):
  return nnx.merge(graphdef, params)(batch["tokens"], batch["segment_ids"], batch["positions"]).logits


def test_it_is_small_and_complete():
  assert sum(f.stat().st_size for f in TEACHER.iterdir()) <= 8 * 2**20
  names = {f.name for f in TEACHER.iterdir()}
  assert names == {
    *("config.json", "generation_config.json", "model.safetensors", "README.md"),
    *("tokenizer.json", "tokenizer_config.json"),
  }


def test_its_tokenizer_is_the_one_in_the_source(tmp_path):
  save_tokenizer(tmp_path)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (TEACHER / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_generates_right_responses(stock, family):
  model, tokenizer = stock
  records = generate_tasks(family, "held_out", PROMPTS, seed=7)
  inputs = tokenizer.apply_chat_template(
    [r["prompt"] for r in records], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
  )
  # No arguments: generation_config.json must make it greedy, long enough and stop at the end of the turn.
  with torch.no_grad():
    out = model.generate(**inputs)
  texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
  right = sum(grade(family, r["label"], text) for r, text in zip(records, texts, strict=True))
  assert right >= 0.97 * PROMPTS


@pytest.mark.parametrize("family", FAMILIES)
def test_our_decoder_is_right_and_has_the_logits_of_transformers(stock, ours, family):
  records = generate_tasks(family, "held_out", PROMPTS, seed=8)
  examples = train_teacher.encode([(r["prompt"][0]["content"], r["label"]) for r in records])
  assert train_teacher.exact_accuracy(*ours, examples) >= 0.97
  batch = train_teacher.pack(iter(examples), rows=8, length=96)
  found = _logits(ours[1], ours[0], batch)
  for row, segments in enumerate(batch["segment_ids"]):
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      with torch.no_grad():
        expected = stock[0](torch.tensor(batch["tokens"][row, here])[None]).logits[0]
      np.testing.assert_allclose(found[row, here], expected, atol=2e-4)
