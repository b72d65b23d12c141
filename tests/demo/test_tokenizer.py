"""The demo tokenizer: lossless on the families' text, small template, loaded alike by stock transformers."""

import pytest
from transformers import AutoTokenizer

from zeda_jax.demo import families, tokenizer, train_teacher


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tokenizer.save_tokenizer(path)
  return path


@pytest.mark.parametrize("family", families.FAMILIES)
def test_round_trip_through_the_chat_template(saved, family):
  loaded = AutoTokenizer.from_pretrained(saved)
  records = families.generate_tasks(family, "held_out", 500)
  encoded = train_teacher.encode([(r["prompt"][0]["content"], r["label"]) for r in records])
  for record, (ids, prompt_length) in zip(records, encoded, strict=True):
    prompt_ids = loaded.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False)
    answer = {"role": "assistant", "content": record["label"]}
    assert prompt_ids == ids[:prompt_length]
    assert loaded.apply_chat_template([*record["prompt"], answer], return_dict=False) == ids
    assert loaded.unk_token_id not in ids
    assert loaded.decode(prompt_ids, skip_special_tokens=True) == record["prompt"][0]["content"]
    assert loaded.decode(ids[prompt_length:], skip_special_tokens=True) == record["label"]
    assert ids[-1] == loaded.eos_token_id
    assert prompt_length <= 32 and len(ids) - prompt_length <= 14


def test_digits_and_letters_are_single_tokens_and_words_end_where_letters_end():
  backend = tokenizer.build_backend()
  assert backend.encode("What is 123+45?").tokens == ["What", " is", " ", *"123+45?"]
  assert backend.encode("Write inuk in quotes.").tokens == ["Write", " ", *"inuk", " in", " quotes", "."]
  assert backend.encode("[1, 2]").tokens == ["[", "1", ", ", "2", "]"]
  assert backend.encode("List ab, cd").tokens == ["List", " ", *"ab", ",", " ", *"cd"]


def test_vocabulary_is_small_and_unknown_characters_stay_one_token_each():
  ids = tokenizer.vocabulary()
  assert len(ids) <= 160 and sorted(ids.values()) == list(range(len(ids)))
  assert tokenizer.build_backend().encode("aéa").tokens == ["a", tokenizer.UNK, "a"]


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
  tokenizer.save_tokenizer(tmp_path)
  assert sorted(f.name for f in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
  for file in tmp_path.iterdir():
    assert file.read_bytes() == (saved / file.name).read_bytes()
