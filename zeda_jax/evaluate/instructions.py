"""Whether a response follows its instructions: the publishers' own verifiers, called as they call them.

IFEval's are those of lm-eval. IFBench's are not in a package registry on their own: they come with the repository
(`pip install git+https://github.com/allenai/IFBench`), or, a copy, with lighteval; whichever is installed is used.
"""

import functools
import importlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zeda_jax.errors import ZedaError

REGISTRIES = {
  "ifeval": ("lm_eval.tasks.ifeval.instructions_registry",),
  "ifbench": ("ifbench.instructions_registry", "lighteval.tasks.tasks.ifbench.instructions_registry"),
}
_INSTALL = {
  "ifeval": "pip install 'zeda-jax[evaluate]'",
  "ifbench": "pip install git+https://github.com/allenai/IFBench",
}
_PUNKT = (
  "IFEval counts sentences with NLTK's model punkt_tab, which is neither installed nor could be downloaded: run "
  "`python -m nltk.downloader punkt_tab` where there is a network, and set NLTK_DATA to the directory it went to."
)


@functools.cache
def registry(benchmark: str) -> Mapping[str, Any]:
  """Name of an instruction -> its verifier class.

  Raises:
    ZedaError: the verifiers, or the NLTK model that they need, are not installed.
  """
  require_punkt()
  reasons = []
  for name in REGISTRIES[benchmark]:
    try:
      return importlib.import_module(name).INSTRUCTION_DICT
    except ImportError as error:
      reasons.append(f"{name}: {error}")
  raise ZedaError(f"{benchmark}: its verifiers are not installed ({'; '.join(reasons)}): {_INSTALL[benchmark]}.")


@functools.cache
def require_punkt() -> None:
  """Finds NLTK's sentence model, or downloads it; the verifiers would fail in the middle without it.

  Raises:
    ZedaError: neither is possible, or the libraries are not installed.
  """
  try:
    import langdetect
    import nltk
  except ImportError as error:
    raise ZedaError(f"the verifiers of instructions are not installed ({error}): {_INSTALL['ifeval']}.") from error
  langdetect.DetectorFactory.seed = 0  # it guesses at random otherwise
  try:
    nltk.data.find("tokenizers/punkt_tab/english/")
  except LookupError:
    if not nltk.download("punkt_tab", quiet=True):
      raise ZedaError(_PUNKT) from None


def check_known(benchmark: str, names: Iterable[str]) -> None:
  """Raises ZedaError if an instruction has no verifier, or the verifiers are not installed."""
  unknown = sorted(set(names) - registry(benchmark).keys())
  if unknown:
    raise ZedaError(
      f"{benchmark}: no verifier for {', '.join(unknown)}; known are {', '.join(sorted(registry(benchmark)))}."
    )


def follows(benchmark: str, answer: Mapping[str, Any], response: str) -> list[bool]:
  """Whether a response follows each of its instructions: strictly for IFEval, loosely for IFBench.

  Args:
    benchmark: "ifeval" or "ifbench".
    answer: {"instructions", "kwargs", "prompt"} of the problem.
    response: without its reasoning.
  """
  texts = [response] if benchmark == "ifeval" else _loosened(response)
  verdicts = []
  for name, kwargs in zip(answer["instructions"], answer["kwargs"], strict=True):
    verifier = registry(benchmark)[name](name)
    random.seed(name)  # a verifier draws what its settings leave open
    verifier.build_description(**kwargs)
    arguments = verifier.get_instruction_args()
    if arguments and "prompt" in arguments:
      verifier.build_description(prompt=answer["prompt"])
    verdicts.append(any(bool(text.strip()) and bool(verifier.check_following(text)) for text in texts))
  return verdicts


def _loosened(response: str) -> Sequence[str]:
  """The response, without its first or last line or both, each also without asterisks."""
  lines = response.split("\n")
  parts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
  return [*parts, *(part.replace("*", "") for part in parts)]
