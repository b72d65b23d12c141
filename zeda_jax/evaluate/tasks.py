"""The benchmarks, as data: what is asked, how often, who grades, and where the problems are found.

Prompts are worded here; the numbers of samples are the paper's (Section 5 of arXiv 2605.18643). A task of one's own is
a row: `Task("name", "Title", "math", MATH)`, given to `zeda_jax.evaluate.benchmark.run`.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from zeda_jax.errors import ZedaError

# The paper's sampling.
TEMPERATURE, TOP_P, TOP_K, MAX_NEW_TOKENS = 0.6, 0.95, 20, 38912

MATH = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
CHOICE = (
  "{problem}\n\n{options}\n\nPlease reason step by step, and end with a line of the form 'Answer: X', where X is the "
  "letter of the right choice."
)
FUNCTION = (
  "Write a self-contained Python solution of the following problem, with all imports that it needs, in one markdown "
  "code block.\n```python\n{problem}\n```"
)
DESCRIPTION = (
  "Write a self-contained Python solution of the following problem, with all imports that it needs, in one markdown "
  "code block.\n\n{problem}\n\nIt must pass this test:\n```python\n{example}\n```"
)
CONTEST = "Solve the following programming problem.\n\n{problem}\n\n{format}"
PLAIN = "{problem}"

GRADERS = ("exact", "number", "math", "choice", "function", "contest", "ifeval", "ifbench")


@dataclasses.dataclass(frozen=True)
class Task:
  """One benchmark.

  Attributes:
    name: on the command line, and of its file: NAME.jsonl.
    title: in tables.
    grader: one of GRADERS.
    template: the user message, with {problem} and what `problems.fields_of` gives beside it.
    samples: responses to each problem.
    source: where it is found on the network ("hf:REPOSITORY:CONFIG:SPLIT", "hf:REPOSITORY@FILE", "tfds:NAME/SPLIT") or
      in this package ("demo:FAMILY"); None: only in files.
    max_new_tokens, temperature: None means those of the run.
  """

  name: str
  title: str
  grader: str
  template: str
  samples: int = 1
  source: str | None = None
  max_new_tokens: int | None = None
  temperature: float | None = None

  def __post_init__(self) -> None:
    if self.grader not in GRADERS:
      raise ZedaError(f"task {self.name}: grader is {self.grader!r}; expected one of {', '.join(GRADERS)}.")


_LCB = "hf:livecodebench/code_generation_lite@"
_DEMO = {"max_new_tokens": 16, "temperature": 0.0}

TASKS: dict[str, Task] = {
  task.name: task
  for task in (
    Task("gsm8k", "GSM8K", "math", MATH, 1, "hf:openai/gsm8k:main:test"),
    Task("math500", "MATH-500", "math", MATH, 1, "hf:HuggingFaceH4/MATH-500:default:test"),
    Task("aime24", "AIME 24", "math", MATH, 32, "hf:math-ai/aime24:default:test"),
    Task("aime25", "AIME 25", "math", MATH, 32, "hf:math-ai/aime25:default:test"),
    Task("aime26", "AIME 26", "math", MATH, 32, "hf:math-ai/aime26:default:test"),
    Task("humaneval_plus", "HumanEval+", "function", FUNCTION, 8, "hf:evalplus/humanevalplus:default:test"),
    Task("mbpp_plus", "MBPP+", "function", DESCRIPTION, 8, "hf:evalplus/mbppplus:default:test"),
    Task("livecodebench_v5", "LiveCodeBench v5", "contest", CONTEST, 8, _LCB + "test5.jsonl"),
    Task("livecodebench_v6", "LiveCodeBench v6", "contest", CONTEST, 8, _LCB + "test6.jsonl"),
    Task("ifeval", "IFEval (strict)", "ifeval", PLAIN, 1, "hf:google/IFEval:default:train"),
    Task("ifbench", "IFBench (loose)", "ifbench", PLAIN, 1, "hf:allenai/IFBench_test:default:train"),
    Task("gpqa_diamond", "GPQA-Diamond", "choice", CHOICE, 1, "hf:Idavidrein/gpqa:gpqa_diamond:train"),
    Task("mmlu_redux", "MMLU-Redux", "choice", CHOICE, 1, "hf:edinburgh-dawg/mmlu-redux-2.0:*:test"),
    Task("demo_math", "demo: math", "exact", PLAIN, 1, "demo:math", **_DEMO),  # type: ignore[arg-type]
    Task("demo_code", "demo: code", "exact", PLAIN, 1, "demo:code", **_DEMO),  # type: ignore[arg-type]
    Task("demo_instruction", "demo: instruction", "exact", PLAIN, 1, "demo:instruction", **_DEMO),  # type: ignore[arg-type]
  )
}
GROUPS: dict[str, tuple[str, ...]] = {
  "paper": tuple(name for name in TASKS if not name.startswith("demo_")),
  "math": ("gsm8k", "math500", "aime24", "aime25", "aime26"),
  "code": ("humaneval_plus", "mbpp_plus", "livecodebench_v5", "livecodebench_v6"),
  "instruction": ("ifeval", "ifbench"),
  "knowledge": ("gpqa_diamond", "mmlu_redux"),
  "demo": ("demo_math", "demo_code", "demo_instruction"),
}


def select(names: str | Iterable[str]) -> list[Task]:
  """Tasks by name or group ("aime24,code"), each once, in the given order.

  A name is also found without its punctuation and in any case: "AIME-24", "HumanEval+", "MATH500".

  Raises:
    ZedaError: an unknown name, or none.
  """
  given = [n for n in (names.split(",") if isinstance(names, str) else names) if n.strip()]
  if not given:
    raise ZedaError(f"no task is given; expected some of {', '.join(TASKS)}, or a group: {', '.join(GROUPS)}.")
  known = {_plain(name): name for name in TASKS}
  found: dict[str, Task] = {}
  for name in given:
    group = GROUPS.get(name.strip().lower())
    if group is None and _plain(name) not in known:
      raise ZedaError(
        f"task {name.strip()!r} is unknown; expected some of {', '.join(TASKS)}, or a group: {', '.join(GROUPS)}."
      )
    for each in group or (known[_plain(name)],):
      found[each] = TASKS[each]
  return list(found.values())


def _plain(name: str) -> str:
  return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "plus"))


def with_samples(tasks: Sequence[Task], samples: str | None) -> list[Task]:
  """The tasks with other numbers of samples: "4" for all of them, or "aime24=8,aime25=8".

  Raises:
    ZedaError: not a number of at least 1, or a task that is not among them.
  """
  if samples is None:
    return list(tasks)
  default: int | None = None
  by_name: dict[str, int] = {}
  for part in samples.split(","):
    name, _, number = part.rpartition("=")
    if not number.strip().isdigit() or int(number) < 1:
      raise ZedaError(f"--samples: {part!r} has no number of at least 1; expected 4, or aime24=8,aime25=8.")
    if name:
      by_name[_plain(name)] = int(number)
    else:
      default = int(number)
  unknown = by_name.keys() - {_plain(task.name) for task in tasks}
  if unknown:
    raise ZedaError(f"--samples: {', '.join(sorted(unknown))} is not among the tasks of this run.")
  changed = (by_name.get(_plain(task.name), default or task.samples) for task in tasks)
  return [dataclasses.replace(task, samples=n) for task, n in zip(tasks, changed, strict=True)]
