"""The demo teacher's tokenizer: single characters, plus the words and program fragments of the task families.

Digits and letters are always single tokens, so that arithmetic and spelling stay visible to the model. Text is cut by
one regular expression (fragments first, then characters) and looked up; decoding joins the pieces, so every text of the
families comes back unchanged.
"""

import json
import pathlib
import re
import string
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

PAD, UNK, SYSTEM, USER, ASSISTANT, END = SPECIALS = (
  "<|pad|>",
  "<|unk|>",
  "<|im_start|>system",
  "<|im_start|>user",
  "<|im_start|>assistant",
  "<|im_end|>",
)
LIST_COMMA = ", "  # between the numbers of a printed Python list only; elsewhere the space begins a word
WORDS = (
  *("What", " is", "Run:", "Write", "List", " in", " order", " uppercase", " reversed", " sorted", " twice"),
  *(" times", " with", " dashes", " quotes", " brackets", " numbered"),
)
FRAGMENTS = (
  *("print(", '"".join(', "sorted(", "max(", "min(", "range(", ".upper()", ".append(", "[::-1]", "for c in "),
  *("for i in ", ",end="),
)
CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase + " \n+-*/=.,:;?!'\"()[]{}<>_%#"

# One special token per role marker keeps the template's overhead at three tokens a turn.
CHAT_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] + '<|im_end|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
  """Token -> id; the order above is the order of the ids."""
  return {token: i for i, token in enumerate((*SPECIALS, *WORDS, *FRAGMENTS, LIST_COMMA, *CHARACTERS))}


def build_backend() -> Tokenizer:
  """The `tokenizers` object; characters outside the vocabulary become <|unk|>."""
  words = sorted(WORDS, key=len, reverse=True)
  fragments = sorted(FRAGMENTS, key=len, reverse=True)
  # A word must end where its letters end: " in" is not the beginning of " inuka".
  patterns = [*(re.escape(word) + "(?![A-Za-z])" for word in words), *map(re.escape, fragments)]
  pattern = "|".join([*patterns, re.escape(LIST_COMMA) + "(?=[0-9])", r"[\s\S]"])
  tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNK))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
  return tokenizer


def build_tokenizer(max_length: int = 256) -> "PreTrainedTokenizerFast":
  """The Hugging Face tokenizer with its chat template; the end-of-turn token is also the end of text."""
  from transformers import PreTrainedTokenizerFast

  return PreTrainedTokenizerFast(
    tokenizer_object=build_backend(),
    pad_token=PAD,
    unk_token=UNK,
    eos_token=END,
    additional_special_tokens=[SYSTEM, USER, ASSISTANT],
    chat_template=CHAT_TEMPLATE,
    clean_up_tokenization_spaces=False,
    model_max_length=max_length,
    padding_side="left",
  )


def save_tokenizer(path: str | pathlib.Path, max_length: int = 256) -> None:
  """Writes tokenizer.json and tokenizer_config.json (chat template inside); the same bytes every time.

  The second file is written here because `save_pretrained` of transformers 5 names a class that 4 does not have.
  """
  path = pathlib.Path(path)
  build_backend().save(str(path / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "unk_token": UNK,
    "eos_token": END,
    "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "model_max_length": max_length,
    "padding_side": "left",
  }
  (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
