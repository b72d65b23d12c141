"""One model and one server for all files here that one process runs."""

import jax
import numpy as np
import pytest

from tests.serve.server_process import SLOTS, Server, write_model
from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.data.chat import load_tokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("serve") / "half")


@pytest.fixture(scope="session")
def model(model_path):
  return load_hf(model_path)


@pytest.fixture(scope="session")
def logprobs_of(model):
  """Tokens -> their log-probabilities over the vocabulary at each place, [T, V]; by one program for all lengths."""
  width = 64
  forward = jax.jit(lambda tokens: model(tokens).logits[0])

  def logprobs(tokens):
    logits = np.asarray(forward(np.array([[*tokens, *[0] * (width - len(tokens))]])), np.float64)[: len(tokens)]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

  return logprobs


@pytest.fixture(scope="session")
def tokenizer(model_path):
  return load_tokenizer(model_path)


@pytest.fixture(scope="session")
def server(model_path):
  sizes = [f"--num-slots={SLOTS}", "--max-length=1024", "--max-tokens=4096", "--warmup-length=32"]
  with Server(model_path, *sizes, "--max-queue=300", "--max-body-bytes=500000") as server:
    yield server
