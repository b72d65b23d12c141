"""Collects every number of a report and keeps it on disk, so that a report is drawn again without a model.

settings.json        what decides the numbers; another report directory is needed for others
dial/biases.json     the values of zero_expert_bias that are looked at
dial/BIAS.json       one point of the dial: answers graded, and the same texts measured, at one of them
responses.json       the student's answers at bias 0
tokens.npz           per token of those answers, at bias 0
examples.json        some of them as text
teacher.json         what the teacher's answers are worth, where no recipe has measured that
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console

from zeda_jax.analysis.dial import find_biases
from zeda_jax.analysis.measure import Texts, TokenMeasurements, measure_texts, token_ratio
from zeda_jax.analysis.statistics import means
from zeda_jax.analysis.subject import Subject
from zeda_jax.analysis.token_kinds import TokenKinds, pieces
from zeda_jax.config import ModelConfig, from_hf, to_hf
from zeda_jax.data.jsonl import atomic_writer
from zeda_jax.distill.recipe import write_json
from zeda_jax.distill.summary import progress
from zeda_jax.errors import ZedaError
from zeda_jax.evaluate.runner import evaluate
from zeda_jax.models.decoder import Decoder

_SEARCH_TOKENS = 2**14  # on which biases are looked for
_EXAMPLE_TOKENS = 400  # of a response that are shown
_TOKEN_ARRAYS = ("zero_picks", "entropy", "logprob", "teacher_logprob", "forward_kl", "reverse_kl", "load")


@dataclasses.dataclass(frozen=True)
class Budget:
  """How much is measured.

  Attributes:
    biases: values of zero_expert_bias, and 0 is always among them; none: chosen by what they do (see dial.py).
    num_tokens: of prompts and answers that are measured token by token.
    num_examples: responses that are kept as text.
  """

  biases: tuple[float, ...] = ()
  num_tokens: int = 2**18
  num_examples: int = 9


@dataclasses.dataclass(frozen=True)
class Collected:
  """All numbers of a report; `tokens` are those at bias 0."""

  config: ModelConfig
  settings: Mapping[str, Any]
  dial: Sequence[Mapping[str, Any]]  # by rising bias
  texts: Texts
  kinds: np.ndarray  # [T] index into token_kinds.KINDS
  family: np.ndarray  # [S] index into `families`
  families: Sequence[str]
  tokens: TokenMeasurements
  examples: Sequence[Mapping[str, Any]]
  teacher_graded: Mapping[str, Any] | None  # what the teacher's answers were worth; None with a recipe's own table

  @property
  def ratio(self) -> np.ndarray:
    """r_ZE of each pass [T]."""
    return token_ratio(self.tokens, self.config.num_experts_per_tok)


def collect(
  subject: Subject, directory: pathlib.Path, budget: Budget | None = None, console: rich.console.Console | None = None
) -> Collected:
  """Measures what is not yet in `directory`, and reads the rest; run again after a kill, it goes on.

  Raises:
    ZedaError: the directory holds numbers of other settings.
  """
  budget, console = budget or Budget(), console or rich.console.Console()
  _claim(directory, _settings(subject, budget))
  responses = _responses(subject, directory, console)
  chosen = within(subject.prompts, responses, budget.num_tokens)
  texts = Texts.of([subject.prompts[i] for i in chosen], [responses[i] for i in chosen])
  if not (directory / "tokens.npz").is_file():
    _write_tokens(subject, texts, chosen, directory, console)
  if not (directory / "examples.json").is_file():
    _write_examples(subject, texts, chosen, responses, directory, budget.num_examples)
  for bias in _biases(subject, texts, directory, budget, console):
    _dial_point(subject, texts, bias, directory, console)
  if subject.main is None and subject.teacher_path is not None and subject.labelled:
    _grade_teacher(subject, directory, console)
  return read(directory)


def read(directory: pathlib.Path) -> Collected:
  """What `collect` left."""
  settings = json.loads((directory / "settings.json").read_text())
  with np.load(directory / "tokens.npz", allow_pickle=False) as file:
    arrays = dict(file)
  texts = Texts(arrays["texts"], arrays["starts"], arrays["prompt_lengths"])
  tokens = TokenMeasurements(**{n: arrays[n] for n in _TOKEN_ARRAYS}, teacher_load=arrays.get("teacher_load"))
  biases = json.loads((directory / "dial" / "biases.json").read_text())
  dial = [json.loads((directory / "dial" / f"{bias}.json").read_text()) for bias in biases]
  examples = json.loads((directory / "examples.json").read_text())
  config = from_hf(settings["model"])
  families = [str(name) for name in arrays["families"]]
  graded_file = directory / "teacher.json"
  graded = json.loads(graded_file.read_text()) if graded_file.is_file() else None
  return Collected(config, settings, dial, texts, arrays["kinds"], arrays["family"], families, tokens, examples, graded)


def family_of(record: Mapping[str, Any]) -> str:
  return str(record.get("family", "all"))


def _settings(subject: Subject, budget: Budget) -> dict[str, Any]:
  answering = dataclasses.asdict(subject.answering)
  del answering["batch_size"]
  return {
    "student": str(subject.student_path),
    "teacher": None if subject.teacher_path is None else str(subject.teacher_path),
    "num_prompts": len(subject.prompts),
    "labelled": subject.labelled,
    **answering,
    "biases": [f"{bias:g}" for bias in budget.biases],
    "num_tokens": budget.num_tokens,
    "num_examples": budget.num_examples,
    "model": to_hf(subject.config),
  }


def _claim(directory: pathlib.Path, settings: dict[str, Any]) -> None:
  file = directory / "settings.json"
  if file.is_file():
    before = json.loads(file.read_text())
    for name in settings:
      if before.get(name) != settings[name]:
        raise ZedaError(
          f"{directory} was measured with {name} {before.get(name)!r}, now it is {settings[name]!r}: use another "
          "--out, or --overwrite to measure again."
        )
    return
  directory.mkdir(parents=True, exist_ok=True)
  write_json(file, settings)


def _responses(subject: Subject, directory: pathlib.Path, console: rich.console.Console) -> list[list[int]]:
  file = directory / "responses.json"
  if not file.is_file():
    graded, responses = _answer(subject, subject.student, 0.0, "answers", console)
    write_json(directory / "dial" / "graded-0.json", graded)
    write_json(file, responses)
  return json.loads(file.read_text())


def _grade_teacher(subject: Subject, directory: pathlib.Path, console: rich.console.Console) -> None:
  if not (directory / "teacher.json").is_file():
    assert subject.teacher is not None
    write_json(directory / "teacher.json", _answer(subject, subject.teacher, 0.0, "teacher's answers", console)[0])


def _answer(
  subject: Subject, model: Decoder, bias: float, label: str, console: rich.console.Console
) -> tuple[dict[str, Any], list[list[int]]]:
  """What a model's answers at this bias are worth, and their tokens."""
  answering = dataclasses.asdict(subject.answering)
  answering["batch_size"] = min(answering["batch_size"], len(subject.prompts))
  with progress(console, label) as show:
    result, samples = evaluate(
      model,
      subject.prompts,
      subject.records,
      subject.decode,
      zero_expert_bias=bias,
      progress=show,
      **answering,
    )
  graded = {
    **dataclasses.asdict(result),
    "average": _number(result.average),
    "standard_error": _number(result.standard_error),
  }
  return graded, [sample.tokens for sample in samples]


def _number(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None


def within(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], num_tokens: int) -> list[int]:
  """Evenly spaced texts of at most `num_tokens` tokens together, and at least one."""
  lengths = np.asarray([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
  count = len(lengths)
  while count > 1:
    chosen = np.linspace(0, len(lengths) - 1, count).astype(int)
    excess = lengths[chosen].sum() / num_tokens
    if excess <= 1:
      return chosen.tolist()
    count = min(count - 1, int(count / excess))
  return [0]


def _write_tokens(
  subject: Subject, texts: Texts, chosen: Sequence[int], directory: pathlib.Path, console: rich.console.Console
) -> None:
  with progress(console, "tokens") as show:
    measured = measure_texts(subject.student, texts, subject.teacher, progress=show)
  kind_of = TokenKinds(subject.tokenizer)
  spans = zip(texts.starts[:-1], texts.starts[1:], strict=True)
  kinds = np.concatenate([kind_of(texts.tokens[a:b].tolist()) for a, b in spans])
  families = sorted({family_of(subject.records[i]) for i in chosen})
  family = np.asarray([families.index(family_of(subject.records[i])) for i in chosen], np.int32)
  arrays: dict[str, Any] = {name: getattr(measured, name) for name in _TOKEN_ARRAYS}
  if measured.teacher_load is not None:
    arrays["teacher_load"] = measured.teacher_load
  arrays |= {"texts": texts.tokens, "starts": texts.starts, "prompt_lengths": texts.prompt_lengths}
  arrays |= {"kinds": kinds, "family": family, "families": np.asarray(families)}
  with atomic_writer(directory / "tokens.npz") as out:
    np.savez_compressed(out, allow_pickle=False, **arrays)


def _write_examples(
  subject: Subject,
  texts: Texts,
  chosen: Sequence[int],
  responses: Sequence[Sequence[int]],
  directory: pathlib.Path,
  count: int,
) -> None:
  """The first measured texts of each family in turn, not picked by what they show."""
  by_family: dict[str, list[int]] = {}
  for place, number in enumerate(chosen):
    by_family.setdefault(family_of(subject.records[number]), []).append(place)
  in_order = [places for _, places in sorted(by_family.items())]
  turns = [place for turn in range(count) for places in in_order for place in places[turn : turn + 1]]
  examples = []
  for place in sorted(turns[:count], key=lambda p: (family_of(subject.records[chosen[p]]), p)):
    number = chosen[place]
    tokens = [*subject.prompts[number], *responses[number]][: len(subject.prompts[number]) + _EXAMPLE_TOKENS]
    family = family_of(subject.records[number])
    examples.append({"text": place, "family": family, "pieces": pieces(subject.tokenizer, tokens)})
  write_json(directory / "examples.json", examples)


def _biases(
  subject: Subject, texts: Texts, directory: pathlib.Path, budget: Budget, console: rich.console.Console
) -> list[float]:
  file = directory / "dial" / "biases.json"
  if not file.is_file():
    biases = sorted({0.0, *budget.biases}) if budget.biases else find_biases(_ratio_at(subject, texts, console))
    write_json(file, [f"{bias:g}" for bias in biases])
  return [float(bias) for bias in json.loads(file.read_text())]


def _ratio_at(subject: Subject, texts: Texts, console: rich.console.Console) -> Callable[[float], float]:
  """r_ZE of the answers among some of the texts, at a bias."""
  spans = [texts.tokens[a:b].tolist() for a, b in zip(texts.starts[:-1], texts.starts[1:], strict=True)]
  prompts = [span[:length] for span, length in zip(spans, texts.prompt_lengths, strict=True)]
  responses = [span[length:] for span, length in zip(spans, texts.prompt_lengths, strict=True)]
  chosen = within(prompts, responses, _SEARCH_TOKENS)
  some = Texts.of([prompts[i] for i in chosen], [responses[i] for i in chosen])
  console.print("looking for values of zero_expert_bias", highlight=False)

  def ratio_at(bias: float) -> float:
    measured = measure_texts(subject.student, some, None, bias)
    return float(token_ratio(measured, subject.config.num_experts_per_tok)[some.in_response].mean())

  return ratio_at


def _dial_point(
  subject: Subject, texts: Texts, bias: float, directory: pathlib.Path, console: rich.console.Console
) -> None:
  file = directory / "dial" / f"{bias:g}.json"
  if file.is_file():
    return
  graded_file = directory / "dial" / f"graded-{bias:g}.json"
  graded = json.loads(graded_file.read_text()) if graded_file.is_file() else None
  if graded is None and subject.labelled:
    graded, _ = _answer(subject, subject.student, bias, f"answers at zero_expert_bias {bias:g}", console)
  with progress(console, f"tokens at zero_expert_bias {bias:g}") as show:
    measured = measure_texts(subject.student, texts, subject.teacher, bias, show)
  ratio = token_ratio(measured, subject.config.num_experts_per_tok)
  nothing = np.zeros(len(texts.tokens), int)

  def mean(values: np.ndarray, mask: np.ndarray) -> list[float | None]:
    return [_number(x) for x in means(values, texts.text, nothing, 1, mask=mask)[0]]

  answers = texts.in_response
  same_texts = {
    "ratio": mean(ratio, texts.is_pass),
    "ratio_response": mean(ratio, answers),
    "forward_kl": mean(measured.forward_kl, answers),
    "reverse_kl": mean(measured.reverse_kl, answers),
    "entropy": mean(measured.entropy, answers),
  }
  write_json(file, {"bias": f"{bias:g}", "graded": graded, "same_texts": same_texts})
