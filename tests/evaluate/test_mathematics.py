"""Verdicts on pairs of a right answer and a response, each known from mathematics, not from the grader."""

import subprocess
import sys

import pytest

from zeda_jax.evaluate import mathematics
from zeda_jax.evaluate.mathematics import same_answer

BOXED = {
  True: [
    ("70", "070"),
    ("204", "204"),
    ("1000", "1,000"),
    ("1000000", "10^6"),
    ("0.5", "\\frac{1}{2}"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "1/2"),
    ("\\frac{1}{2}", "\\dfrac{1}{2}"),
    ("\\frac{1}{2}", "\\tfrac12"),
    ("\\frac{2}{4}", "\\frac{1}{2}"),
    ("-\\frac{2}{3}", "\\frac{-2}{3}"),
    ("\\frac{9}{7}", "1\\frac{2}{7}"),
    ("0.125", "\\frac18"),
    ("3", "\\sqrt{9}"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("\\sqrt[3]{2}", "2^{1/3}"),
    ("\\pi", "\\pi"),
    ("\\frac{\\pi}{2}", "\\pi/2"),
    ("2\\pi", "\\pi \\cdot 2"),
    ("e^2", "e^{2}"),
    ("16", "2^4"),
    ("120", "5!"),
    ("10", "\\binom{5}{2}"),
    ("1", "\\sin^2 x + \\cos^2 x"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    ("(x-1)(x+1)", "x^2-1"),
    ("x^2-1", "-1+x^2"),
    ("\\frac{x^2-1}{x-1}", "x+1"),
    ("3x+2y", "2y+3x"),
    ("\\log 100", "\\log(100)"),
    ("(3,4)", "(3, 4)"),
    ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
    ("(1,2,3)", "\\left(1,2,3\\right)"),
    ("\\{1,2,3\\}", "\\{3,1,2\\}"),
    ("1,2", "2, 1"),
    ("[0,1]", "\\left[0,1\\right]"),
    ("(0,\\infty)", "(0,+\\infty)"),
    ("[-2,7]", "x \\in [-2,7]"),
    ("(-\\infty,0)\\cup(1,\\infty)", "(1,\\infty)\\cup(-\\infty,0)"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y=2x+3", "y = 3 + 2x"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}"),
    ("\\begin{pmatrix} 1/2 \\\\ 0 \\end{pmatrix}", "\\begin{pmatrix} 0.5 \\\\ 0 \\end{pmatrix}"),
    ("3+4i", "4i+3"),
    ("90^\\circ", "90"),
    ("\\$18.90", "18.90"),
    ("10\\%", "10\\%"),
    ("\\text{Evelyn}", "\\text{Evelyn}"),
    ("\\text{even}", "\\text{even}"),
    ("12\\text{ cm}", "12"),
    ("0", "0.0"),
    ("-7", "-7.0"),
    ("0.333333333", "\\frac{1}{3}"),
    ("3.14", "3.140"),
  ],
  False: [
    ("70", "71"),
    ("70", "700"),
    ("70", "-70"),
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("\\frac{1}{2}", "2"),
    ("0.5", "0.51"),
    ("3", "3.001"),
    ("2\\sqrt{2}", "2\\sqrt{3}"),
    ("\\pi", "3.14"),
    ("\\pi", "2\\pi"),
    ("e^2", "e^3"),
    ("x+1", "x-1"),
    ("x^2", "x^3"),
    ("x+y", "x-y"),
    ("x", "y"),
    ("(3,4)", "(4,3)"),
    ("(1,2,3)", "(1,2)"),
    ("\\{1,2,3\\}", "\\{1,2\\}"),
    ("\\{1,2\\}", "\\{1,3\\}"),
    ("[0,1]", "(0,1)"),
    ("[0,1]", "[0,2]"),
    ("(0,\\infty)", "(1,\\infty)"),
    ("x=5", "x=6"),
    ("y=2x+3", "y=2x+4"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 4 & 3 \\end{pmatrix}"),
    ("3+4i", "3-4i"),
    ("\\text{Evelyn}", "\\text{Carla}"),
    ("\\text{even}", "\\text{odd}"),
    ("10", ""),
    ("1000", "10^4"),
    ("120", "4!"),
    ("0", "1"),
    ("-7", "7"),
    ("\\infty", "0"),
    ("\\frac{9}{7}", "\\frac{7}{9}"),
  ],
}
TEXTS = [
  ("72", "She sold 48 + 24 = 72 clips.\n#### 72", True),
  ("72", "The answer is 72.", True),
  ("72", "So the answer is $72$.", True),
  ("72", "The answer is 72 clips, from 48 and 24: \\boxed{72}", True),
  ("72", "The final answer is \\boxed{71}. I first thought 72.", False),
  ("72", "First \\boxed{71}. No: \\boxed{72}", True),
  ("71", "First \\boxed{71}. No: \\boxed{72}", False),
  ("1,2", "The roots are \\boxed{1} and \\boxed{2}.", True),
  ("72", "I do not know.", False),
  ("72", "", False),
  ("18", "She makes 9 * 2 = $18 every day.", True),
  ("540", "540 meters", True),
  ("1/2", "The probability is \\(\\frac{1}{2}\\).", True),
  ("\\frac{1}{2}", "The probability is \\[\\frac{1}{2}\\]", True),
  ("70000", "He made a profit of $70,000", True),
  ("3", "Final answer: **3**", True),
  ("x^2", "$$\\boxed{x^{2}}$$", True),
  ("204", "\\boxed{204", False),
]


def test_there_are_enough():
  assert len(BOXED[True]) + len(BOXED[False]) + len(TEXTS) >= 100


@pytest.mark.parametrize("right", [True, False])
def test_boxed_answers(right):
  found = {(a, b): same_answer(a, f"We find\n\\[\\boxed{{{b}}}\\]") for a, b in BOXED[right]}
  assert not {pair: verdict for pair, verdict in found.items() if verdict[0] != right}


def test_answers_in_texts():
  found = {(a, text): (same_answer(a, text)[0], right) for a, text, right in TEXTS}
  assert not {pair: verdict for pair, verdict in found.items() if verdict[0] != verdict[1]}


def test_what_never_ends_is_stopped(monkeypatch):
  monkeypatch.setattr(mathematics, "SECONDS", 1)
  right, why = same_answer("5", "\\boxed{10^{10^{10^{10}}}}")
  assert not right and "took more than" in why


def test_a_right_answer_that_cannot_be_read_is_no_verdict():
  with pytest.raises(ValueError, match="cannot read"):
    same_answer("", "5")


def test_neither_jax_nor_torch_is_imported():
  program = "import sys; from zeda_jax.evaluate.worker import grade; print(grade('math', '5', '5')['score'])"
  program += "; assert not {'jax', 'torch'} & sys.modules.keys()"
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
  assert done.stdout == "1.0\n", done.stderr
