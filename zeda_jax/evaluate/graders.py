"""Exact graders: (response text, label) -> right or wrong."""

import re
from collections.abc import Callable

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(response: str, label: str) -> bool:
  """The response is the label, but for white space around it."""
  return response.strip() == str(label).strip()


def number(response: str, label: str) -> bool:
  """The last number of the response equals the last number of the label."""
  found, wanted = (_NUMBER.findall(text) for text in (response, str(label)))
  return bool(found) and bool(wanted) and float(found[-1].replace(",", "")) == float(wanted[-1].replace(",", ""))


GRADERS: dict[str, Callable[[str, str], bool]] = {"exact": exact, "number": number}
