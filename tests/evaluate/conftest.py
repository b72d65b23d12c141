"""NLTK's sentence model, which verifiers of instructions need and no package brings: one trained here."""

import pathlib

import pytest

TEXT = """
Mr. Smith went to Washington. He met Dr. Jones there. They talked about e.g. trains, planes and cars. It was late. The
train left at 5 p.m. and nobody saw it. Prof. Miller wrote a letter. She sent it to Mrs. Brown. It never arrived. Who
knows why? Nobody does! The U.S. mail is slow. Perhaps it was lost. Mr. Brown was not amused. Dr. Jones laughed. They
all went home. The end came soon. It rained. The sun came out. Nobody cared. Everyone was happy.
"""


@pytest.fixture(scope="session")
def punkt(tmp_path_factory):
  """Puts NLTK's Punkt, trained on a few sentences, where NLTK looks for it, in this process and in those it starts."""
  import os

  import nltk
  from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

  data = tmp_path_factory.mktemp("nltk_data")
  nltk.data.path.insert(0, str(data))
  before = os.environ.get("NLTK_DATA")
  os.environ["NLTK_DATA"] = str(data)
  target = pathlib.Path(data, "tokenizers", "punkt_tab", "english")
  target.parent.mkdir(parents=True)
  save_punkt_params(PunktTrainer(TEXT * 5).get_params(), dir=str(target))
  yield data
  nltk.data.path.remove(str(data))
  if before is None:
    del os.environ["NLTK_DATA"]
  else:
    os.environ["NLTK_DATA"] = before
