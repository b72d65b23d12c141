"""The page in a real browser: light and dark, on a desk and on a phone."""

import matplotlib.image
import pytest

from tests.report import browser

CHROME = browser.find()
pytestmark = pytest.mark.skipif(CHROME is None, reason="no Chromium or Chrome on PATH or in $CHROME")


@pytest.fixture
def page(whole):
  return whole[0] / "index.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_page(page, tmp_path, width, dark):
  seen = browser.look(CHROME, page, tmp_path, width, dark)
  report = seen.report
  assert not seen.console
  assert not report["problems"]
  assert not report["requests"]
  assert report["viewport"] == width
  assert report["width"] == report["room"] > width - 20, report["wide"]
  assert not report["wide"]
  assert report["dark"] == dark
  expected = {False: ("rgb(246, 247, 249)", "rgb(26, 33, 41)"), True: ("rgb(15, 19, 24)", "rgb(232, 235, 240)")}
  assert (report["background"], report["color"]) == expected[dark]
  assert report["smallest"] >= 8  # pixels: figures stay readable on a phone
  assert min(report["sizes"]) >= (300 if width < 600 else 320)


def test_figures_take_the_colours_of_the_theme(page, tmp_path):
  ink = {dark: browser.look(CHROME, page, tmp_path, 800, dark).report["ink"] for dark in (False, True)}
  assert ink[False] != ink[True]


def test_what_is_seen(page, tmp_path):
  """Most of a light page is bright and most of a dark one is not."""
  brightness = {}
  for dark in (False, True):
    browser.screenshot(CHROME, page, tmp_path / f"{dark}.png", tmp_path, dark)
    brightness[dark] = float(matplotlib.image.imread(tmp_path / f"{dark}.png")[..., :3].mean())
  assert brightness[False] > 0.85
  assert brightness[True] < 0.25
