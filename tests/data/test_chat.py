import json
import logging
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zeda_jax.data import chat, prompts
from zeda_jax.errors import ZedaError

TEXT = ["the quick brown fox jumps over the lazy dog", "what is two plus two?", "four, of course; not five"]
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n"
  "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four, of course"}


def make_tokenizer(directory, template=TEMPLATE, words=TEXT, eos="<|im_end|>"):
  core = Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=290,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator(words, trainer)
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>")
  tokenizer.chat_template = template
  tokenizer.save_pretrained(directory)
  return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory):
  return chat.load_tokenizer(directory)


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
  return chat.load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("plain"), template=None))


def open_records(path, *records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return prompts.open_prompts(path)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_moe_plus_plus"])
def test_loads_beside_the_config_of_a_static_or_dynamic_checkpoint(directory, tmp_path, model_type, caplog):
  shutil.copytree(directory, tmp_path / "model")
  (tmp_path / "model/config.json").write_text(json.dumps({"model_type": model_type}))
  logger = logging.getLogger("transformers")
  logger.addHandler(caplog.handler)
  try:
    tokenizer = chat.load_tokenizer(str(tmp_path / "model"))
  finally:
    logger.removeHandler(caplog.handler)
  assert tokenizer.decode(tokenizer("the fox")["input_ids"]) == "the fox"
  assert not caplog.records  # transformers warns of the model_type it does not know, which means nothing here


def test_a_missing_or_broken_tokenizer_is_a_sentence(directory, tmp_path):
  for missing in (tmp_path, tmp_path / "nowhere"):
    with pytest.raises(ZedaError, match=r"no tokenizer: looked for tokenizer\.json or vocab\.json \+ merges\.txt"):
      chat.load_tokenizer(missing)
  shutil.copytree(directory, tmp_path / "broken")
  (tmp_path / "broken/tokenizer.json").write_text('{"version": ')
  with pytest.raises(ZedaError, match="the tokenizer cannot be read"):
    chat.load_tokenizer(tmp_path / "broken")


def test_code_of_the_checkpoint_is_not_run(directory, tmp_path):
  target = tmp_path / "model"
  shutil.copytree(directory, target)
  config = json.loads((target / "tokenizer_config.json").read_text())
  config |= {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
  (target / "tokenizer_config.json").write_text(json.dumps(config))
  (target / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
  try:
    chat.load_tokenizer(target)
  except ZedaError as error:
    assert "cannot be read" in str(error)
  assert not (tmp_path / "ran").exists()


def test_prompts_go_through_the_chat_template(tokenizer):
  expected = "<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\n"
  for record in ({"prompt": "two plus two?"}, {"prompt": [USER]}, {"messages": [USER, ANSWER]}):
    tokens = chat.render_prompt(tokenizer, record)
    assert all(type(token) is int for token in tokens)
    assert tokenizer.decode(tokens) == expected
    assert tokens[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
  options = {"enable_thinking": False}
  tokens = chat.render_prompt(tokenizer, {"prompt": "two plus two?"}, template_options=options)
  assert tokenizer.decode(tokens) == expected + "<think></think>"


def test_without_a_template_text_is_plain_and_messages_are_refused(plain_tokenizer):
  assert plain_tokenizer.decode(chat.render_prompt(plain_tokenizer, {"prompt": "the fox"})) == "the fox"
  with pytest.raises(ZedaError, match=r"^p\.jsonl:3: chat messages, but the tokenizer has no chat template"):
    chat.render_prompt(plain_tokenizer, {"prompt": [USER]}, "p.jsonl:3")


def test_a_template_that_raises_is_a_sentence(tmp_path):
  tokenizer = chat.load_tokenizer(make_tokenizer(tmp_path, template="{{ raise_exception('roles must alternate') }}"))
  with pytest.raises(ZedaError, match=r"^p\.jsonl:1: the chat template refuses .*roles must alternate"):
    chat.render_prompt(tokenizer, {"prompt": "x"}, "p.jsonl:1")


def test_lengths_are_checked_against_the_context(tokenizer, tmp_path):
  data = open_records(tmp_path / "p.jsonl", {"prompt": "the fox"}, {"prompt": "the fox " * 9}, {"prompt": "dog"})
  lengths = chat.check_lengths(data, tokenizer, max_new_tokens=10, context=500)
  assert lengths.tolist() == [len(chat.render_prompt(tokenizer, record)) for record in data]
  longest = int(lengths.max())
  chat.check_lengths(data, tokenizer, max_new_tokens=10, context=longest + 10)
  with pytest.raises(ZedaError) as error:
    chat.check_lengths(data, tokenizer, max_new_tokens=10, context=longest + 9)
  message = str(error.value)
  assert message.startswith(f"{tmp_path}/p.jsonl:2: the prompt has {longest} tokens")
  assert f"more than the context of {longest + 9}" in message


def test_lengths_name_the_line_that_cannot_be_rendered(plain_tokenizer, tmp_path):
  data = open_records(tmp_path / "p.jsonl", {"prompt": "x"}, {"messages": [USER]})
  with pytest.raises(ZedaError, match=r"p\.jsonl:2: chat messages, but"):
    chat.check_lengths(data, plain_tokenizer, 1, 100)


def test_vocabularies(tokenizer, directory, tmp_path):
  size = max(tokenizer.get_vocab().values()) + 1
  chat.check_vocabulary(tokenizer, size)
  with pytest.raises(ZedaError, match=rf"id {size - 1}, but vocab_size is {size - 1}"):
    chat.check_vocabulary(tokenizer, size - 1)
  chat.check_same_vocabulary(directory, tokenizer)
  other = make_tokenizer(tmp_path / "other", words=["completely different words zzz zzz"])
  with pytest.raises(ZedaError, match=r"vocabularies of teacher .* and student .*other.* differ in \d+ tokens"):
    chat.check_same_vocabulary(directory, other)
  widened = chat.load_tokenizer(directory)
  widened.add_tokens(["<extra>"])
  with pytest.raises(ZedaError, match=rf"'<extra>' \(no id and id {size}\)"):
    chat.check_same_vocabulary(directory, widened)


def test_eos_ids_come_from_the_first_file_that_names_them(tokenizer, tmp_path):
  assert chat.eos_ids(tmp_path, tokenizer) == (2,)
  (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
  assert chat.eos_ids(tmp_path, tokenizer) == (5,)
  (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
  assert chat.eos_ids(tmp_path, tokenizer) == (5,)
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
  assert chat.eos_ids(tmp_path, tokenizer) == (7, 8)
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
  with pytest.raises(ZedaError, match=r"generation_config\.json: eos_token_id is '</s>'"):
    chat.eos_ids(tmp_path, tokenizer)
  with pytest.raises(ZedaError, match="names no EOS token"):
    chat.eos_ids(tmp_path / "nowhere")


def test_text_rollouts_split_prompt_and_answer(tokenizer, tmp_path):
  data = open_records(tmp_path / "r.jsonl", {"messages": [USER, ANSWER, USER, ANSWER], "label": 4})
  (record,) = chat.text_rollouts(data, tokenizer, eos=(2,))
  turns = "<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\n"
  assert tokenizer.decode(record["prompt_tokens"]) == turns + "four, of course<|im_end|>\n" + turns
  assert tokenizer.decode(record["response_tokens"]) == "four, of course<|im_end|>"  # the line break is nobody's sample
  assert (record["index"], record["finished"], record["logprobs"], record["label"]) == (0, True, None, 4)
  data = open_records(tmp_path / "s.jsonl", {"messages": [USER, ANSWER]}, {"messages": [USER]})
  with pytest.raises(ZedaError, match=r"s\.jsonl:2: 'messages' does not end with an assistant turn"):
    list(chat.text_rollouts(data, tokenizer, eos=(2,)))


def test_text_rollouts_refuse_a_template_that_rewrites_the_prompt(tmp_path):
  template = "{{ messages|length }}" + TEMPLATE
  tokenizer = chat.load_tokenizer(make_tokenizer(tmp_path, template=template))
  with pytest.raises(ZedaError, match=r"r:1: the chat template renders the prompt differently"):
    chat.render_answer(tokenizer, {"messages": [USER, ANSWER]}, (2,), "r:1")
