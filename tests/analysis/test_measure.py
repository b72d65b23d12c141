"""Per-token measurements against numpy on the whole logits of each text alone."""

import jax
import numpy as np
import pytest

from tests.tiny_models import forward, random_tokens, tiny_model
from zeda_jax.analysis.measure import Texts, measure_texts, token_ratio
from zeda_jax.models.decoder import inject

LENGTHS = ((5, 4), (1, 9), (12, 1), (70, 40), (3, 2), (60, 30))  # prompt, response: they need two rows


@pytest.fixture(scope="module")
def teacher():
  return tiny_model()


@pytest.fixture(scope="module")
def student(teacher):
  """Other weights than the teacher's, so that the two disagree."""
  return inject(tiny_model(seed=1), 3)


@pytest.fixture(scope="module")
def texts():
  prompts = [random_tokens((p,), seed=i).tolist() for i, (p, _) in enumerate(LENGTHS)]
  responses = [random_tokens((r,), seed=100 + i).tolist() for i, (_, r) in enumerate(LENGTHS)]
  return Texts.of(prompts, responses)


def spans(texts):
  return list(zip(texts.starts[:-1], texts.starts[1:], strict=True))


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def alone(model, tokens, bias=0.0):
  """(log-probabilities [t, V], picks [L, t, K]) of one text, padded to one compiled shape."""
  padded = np.zeros((1, 110), np.int32)
  padded[0, : len(tokens)] = tokens
  segments = (np.arange(110) < len(tokens)).astype(np.int32)[None]
  out = forward(model, padded, segments, zero_expert_bias=np.float32(bias))
  return log_softmax(out.logits[0, : len(tokens)]), np.asarray(out.picks)[:, 0, : len(tokens)]


@pytest.mark.parametrize("bias", [0.0, 0.7, -np.inf])
def test_numbers_are_those_of_each_text_alone(student, teacher, texts, bias):
  measured = measure_texts(student, texts, teacher, bias)
  load, teacher_load = np.zeros((2, 9), int), np.zeros((2, 6), int)
  for start, end in spans(texts):
    tokens = texts.tokens[start:end]
    mine, picks = alone(student, tokens, bias)
    theirs, teacher_picks = alone(teacher, tokens)
    passes, following = np.arange(len(tokens) - 1), tokens[1:]
    mine, theirs = mine[:-1], theirs[:-1]
    expected = {
      "entropy": -(np.exp(mine) * mine).sum(axis=-1),
      "logprob": mine[passes, following],
      "teacher_logprob": theirs[passes, following],
      "forward_kl": (np.exp(theirs) * (theirs - mine)).sum(axis=-1),
      "reverse_kl": (np.exp(mine) * (mine - theirs)).sum(axis=-1),
      "gap": np.abs(theirs - mine)[passes, following],
    }
    for name, values in expected.items():
      np.testing.assert_allclose(getattr(measured, name)[start : end - 1], values, rtol=2e-4, atol=2e-5, err_msg=name)
      assert np.isnan(getattr(measured, name)[end - 1]), name
    zero = (picks[:, :-1] >= 6).sum(axis=-1)
    np.testing.assert_array_equal(measured.zero_picks[:, start : end - 1], zero)
    for counts, chosen in ((load, picks), (teacher_load, teacher_picks)):
      for layer in range(2):
        counts[layer] += np.bincount(chosen[layer, :-1].reshape(-1), minlength=counts.shape[1])
  np.testing.assert_array_equal(measured.load, load)
  np.testing.assert_array_equal(measured.teacher_load, teacher_load)
  if bias == -np.inf:
    assert measured.zero_picks.sum() == 0
  else:
    assert measured.zero_picks.sum() > 0


def test_without_a_teacher(student, texts):
  measured = measure_texts(student, texts)
  assert measured.teacher_load is None
  assert np.isnan(measured.gap).all()
  assert np.isnan(measured.forward_kl).all()
  assert np.isfinite(measured.entropy[texts.is_pass]).all()


def test_ratio_by_token(student, texts):
  measured = measure_texts(student, texts)
  ratio = token_ratio(measured, 2)
  np.testing.assert_array_equal(np.isnan(ratio), ~texts.is_pass)
  np.testing.assert_allclose(ratio[texts.is_pass], measured.zero_picks.sum(axis=0)[texts.is_pass] / 4)


def test_places_in_texts(texts):
  for number, ((start, end), (prompt, response)) in enumerate(zip(spans(texts), LENGTHS, strict=True)):
    assert (texts.text[start:end] == number).all()
    assert texts.position[start:end].tolist() == list(range(prompt + response))
    assert texts.is_pass[start:end].sum() == prompt + response - 1
    assert np.flatnonzero(texts.in_response[start:end]).tolist() == list(range(prompt - 1, prompt + response - 1))


def test_on_a_mesh(student, teacher, texts):
  """All devices take rows of the batch; with one device this is the plain program under a mesh."""
  from zeda_jax.models.params import reconfigured, resharded
  from zeda_jax.sharding import Sharding, make_mesh

  sharding = Sharding(make_mesh(-1, 1, devices=jax.devices()[:1]))
  place = lambda model: resharded(reconfigured(model, sharding=sharding), sharding)
  plain, spread = measure_texts(student, texts, teacher), measure_texts(place(student), texts, place(teacher))
  np.testing.assert_array_equal(plain.zero_picks, spread.zero_picks)
  np.testing.assert_allclose(plain.reverse_kl, spread.reverse_kl, rtol=1e-4, atol=1e-5)
