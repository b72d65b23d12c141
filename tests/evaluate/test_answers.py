"""Answers found in responses as models write them."""

import pytest

from zeda_jax.evaluate.answers import chosen_letter, code_of, without_reasoning


@pytest.mark.parametrize(
  ("response", "opened", "answer"),
  [
    ("no reasoning", False, "no reasoning"),
    ("<think>hm \\boxed{1}</think>\n\nIt is 2.", False, "It is 2."),
    ("hm \\boxed{1}</think>It is 2.", True, "It is 2."),
    ("<think>first</think>a</think>b", False, "b"),
    ("<think>cut off \\boxed{1}", False, ""),
    ("cut off \\boxed{1}", True, ""),
    ("", False, ""),
  ],
)
def test_reasoning(response, opened, answer):
  assert without_reasoning(response, opened) == answer


@pytest.mark.parametrize(
  ("answer", "letter"),
  [
    ("Answer: B", "B"),
    ("The answer is (C).", "C"),
    ("the correct answer is D", "D"),
    ("**Answer: A**", "A"),
    ("Answer: **B**", "B"),
    ("Answer: $\\boxed{C}$", "C"),
    ("So \\boxed{D}.", "D"),
    ("So \\boxed{\\text{B}}.", "B"),
    ("So \\boxed{(A)}.", "A"),
    ("So \\boxed{B. Paris}", None),
    ("A is wrong, since it is cold. Answer: B", "B"),
    ("Answer: A. Wait, that is wrong.\nAnswer: C", "C"),
    ("I choose\nB", "B"),
    ("B) because it is larger.", "B"),
    ("B. Paris", "B"),
    ("(D)", "D"),
    ("A dog and a cat.", None),
    ("The answer is Aluminium.", None),
    ("Answer: E", None),
    ("I do not know", None),
    ("", None),
  ],
)
def test_letters(answer, letter):
  assert chosen_letter(answer, "ABCD") == letter


def test_only_letters_that_exist_are_chosen():
  assert chosen_letter("Answer: E", "ABCDE") == "E"
  assert chosen_letter("\\boxed{E} or \\boxed{B}", "ABCD") == "B"


@pytest.mark.parametrize(
  ("answer", "wanted", "code"),
  [
    ("Text\n```python\nx = 1\n```\nmore", (), "x = 1\n"),
    ("```py\nx = 1\n```", (), "x = 1\n"),
    ("```\nx = 1\n```", (), "x = 1\n"),
    ("```python\ndef f(): pass\n```\nUse:\n```python\nf()\n```", ("f",), "def f(): pass\n"),
    ("```python\ndef f(): pass\n```\nBetter:\n```python\ndef f(): return 1\n```", ("f",), "def f(): return 1\n"),
    ("```python\nx = 1\n```\n```bash\nls\n```", (), "x = 1\n"),
    ("```cpp\nint x;\n```", (), "int x;\n"),
    ("  ```python\n  x = 1\n  ```", (), "  x = 1\n"),
    ("```python\nx = 1", (), "x = 1"),
    ("x = 1", (), "x = 1"),
    ("", (), ""),
  ],
)
def test_code(answer, wanted, code):
  assert code_of(answer, wanted) == code
