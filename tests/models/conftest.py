"""Directories that stock transformers writes."""

import pathlib

import pytest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """saved(model, shard) -> the directory stock transformers writes."""

  def save(model, shard: str = "5GB") -> pathlib.Path:
    path = tmp_path_factory.mktemp("stock")
    model.save_pretrained(path, max_shard_size=shard)
    return path

  return save
