import pytest

from zeda_jax.evaluate.graders import GRADERS, exact, number


@pytest.mark.parametrize(
  ("response", "label", "right"),
  [
    ("42", "42", True),
    (" 42\n", "42", True),
    ("42", 42, True),
    ("42.", "42", False),
    ("4 2", "42", False),
    ("Abc", "abc", False),
    ("", "42", False),
    ("", "", True),
  ],
)
def test_exact(response, label, right):
  assert exact(response, label) is right


@pytest.mark.parametrize(
  ("response", "label", "right"),
  [
    ("The answer is 42.", "42", True),
    ("First 41, then 42", "#### 42", True),
    ("42 or rather 41", "42", False),
    ("1,234", "1234", True),
    ("1,234.50", 1234.5, True),
    ("-7", "-7", True),
    ("-7", "7", False),
    ("7.0", "7", True),
    ("3, 4, 5", "5", True),
    ("2,3", "3", False),
    ("none", "7", False),
    ("7", "none", False),
    ("", "", False),
    ("10-3=7", "7", True),
    ("x=-0.5", "-.5", False),
  ],
)
def test_number(response, label, right):
  assert number(response, label) is right


def test_graders_are_found_by_name():
  assert {"exact": exact, "number": number} == GRADERS
