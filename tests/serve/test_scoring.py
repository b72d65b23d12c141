"""Scores equal those read from all logits at once, whatever is scored together."""

import jax
import numpy as np
import pytest

from tests.tiny_models import tiny_model
from zeda_jax.serve import scoring
from zeda_jax.serve.scoring import Scorer

RNG = np.random.default_rng(0)
LENGTHS = (1, 2, 9, 16)


@pytest.fixture(scope="module")
def model():
  return tiny_model(num_zero_experts=2, moe_layers=(True,))


def test_scores(model, monkeypatch):
  config, forward = model.config, jax.jit(lambda tokens, bias: model(tokens, zero_expert_bias=bias))
  monkeypatch.setattr(scoring, "_LOGITS_BYTES", 4 * 64 * 4 * 5)  # so few that a row is done in blocks of 4 places
  scorer = Scorer(model, max_length=128, max_tokens=256, max_rows=8)
  assert (scorer.bucket(64), scorer.bucket(65), scorer.batch_size(64), scorer.batch_size(128)) == (64, 128, 4, 2)
  sequences = [RNG.integers(0, config.vocab_size, length).tolist() for length in LENGTHS]
  biases = [0.0, 1.0, -1.0, float("-inf")]
  for row, (sequence, found) in enumerate(zip(sequences, scorer(sequences, biases, 3), strict=True)):
    out = forward(np.array([[*sequence, *[0] * (16 - len(sequence))]]), biases[row])
    logits = np.asarray(out.logits[0, : len(sequence) - 1], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = logprobs[np.arange(len(sequence) - 1), sequence[1:]]
    np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-5)
    assert len(found.top) == len(sequence) - 1
    for place, top in enumerate(found.top):
      assert len(top) == scoring.MAX_TOP
      assert [token for token, _ in top] == np.argsort(-logprobs[place])[: len(top)].tolist()
      np.testing.assert_allclose([value for _, value in top], [logprobs[place, t] for t, _ in top], rtol=0, atol=1e-5)
      if top[0][0] == sequence[place + 1]:
        assert top[0][1] == found.logprobs[place]  # bit for bit: lm-eval compares them
    zero = np.asarray(out.picks)[:, :, : len(sequence)] >= config.num_experts
    assert found.zero_ratio == pytest.approx(float(zero.mean()))
    alone = scorer([sequence], biases[row : row + 1], 3)[0]
    np.testing.assert_allclose(alone.logprobs, found.logprobs, rtol=0, atol=1e-5)
