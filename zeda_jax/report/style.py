"""How figures look, and how one drawing serves white paper and pages in light and dark.

Every colour of the palette is used for one meaning. PNGs show the light palette. In the SVG that goes into the page
each colour is replaced by a variable of the style sheet, which follows the reader's choice of light or dark.
"""

import base64
import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# meaning -> (light, dark)
PALETTE = {
  "ink": ("#1a2129", "#e8ebf0"),
  "muted": ("#626c78", "#9aa5b1"),
  "grid": ("#e2e6eb", "#2b333d"),
  "student": ("#1f6f8b", "#5cb8d6"),
  "baseline": ("#c8553d", "#f28b70"),
  "green": ("#5a8a3f", "#9acb78"),
  "purple": ("#8560ab", "#c4a4e8"),
  "gold": ("#a97a1c", "#e3ba5c"),
  "grey": ("#4b5866", "#aab7c5"),
  "paper": ("#fdfefe", "#171c23"),  # text on a coloured ground
}
INK, MUTED, GRID, STUDENT, BASELINE, GREEN, PURPLE, GOLD, GREY, PAPER = (light for light, _ in PALETTE.values())
SERIES = (STUDENT, BASELINE, GREEN, PURPLE, GOLD, GREY)

# Few to many skipped picks: warm where experts work, cool where they rest. Reads on white and on black.
WORK, REST = (0.851, 0.424, 0.286), (0.137, 0.490, 0.612)
HEAT = matplotlib.colors.LinearSegmentedColormap.from_list(
  "skipped", ["#8f2d1c", "#d96c49", "#f2c9a1", "#e9ecdf", "#a5cfd6", "#3d8ea8", "#12495f"]
)

# Layers from first to last: hues of like lightness, which all read on white and on black.
DEPTH = matplotlib.colors.LinearSegmentedColormap.from_list("depth", [PURPLE, "#4f7fc0", STUDENT, GREEN, GOLD])

_RC: Any = {
  "svg.fonttype": "none",
  "font.family": "sans-serif",
  "font.sans-serif": ["DejaVu Sans"],
  "font.size": 9,
  "axes.labelsize": 9,
  "xtick.labelsize": 8.5,
  "ytick.labelsize": 8.5,
  "legend.fontsize": 8.5,
  "legend.frameon": False,
  "text.color": INK,
  "axes.labelcolor": MUTED,
  "axes.edgecolor": GRID,
  "xtick.color": MUTED,
  "ytick.color": MUTED,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": GRID,
  "grid.linewidth": 0.8,
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "xtick.minor.size": 0,
  "ytick.minor.size": 0,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.unicode_minus": True,
  "lines.linewidth": 1.8,
  "lines.solid_capstyle": "round",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
  """All figures are made and saved within this."""
  with matplotlib.rc_context(_RC):
    yield


def new_figure(width: float = 4.4, height: float = 3.1, columns: int = 1) -> tuple[Figure, list[Axes]]:
  """A figure without a window; sizes in inches, of which a page shows about 70 pixels each."""
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.subplots(1, columns, squeeze=False)[0]
  return figure, list(axes)


def legend_above(axes: Axes, columns: int = 2) -> None:
  """A legend over the axes, where no line is."""
  space = {"borderaxespad": 0.2, "columnspacing": 1.2, "handletextpad": 0.5, "handlelength": 1.6}
  axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, **space)


def png(figure: Figure) -> bytes:
  out = io.BytesIO()
  figure.savefig(out, format="png", dpi=200, facecolor="white", metadata={"Software": None})
  return out.getvalue()


def svg(figure: Figure, name: str, label: str) -> str:
  """The figure as an <svg> element for a page: colours as variables, ids of its own, nothing that points elsewhere.

  Args:
    figure: drawn with the palette above.
    name: prefix of its ids, unique on the page.
    label: what a screen reader says.
  """
  out = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": name}):
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  text = out.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
  text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
  text = re.sub(r'\bid="', f'id="{name}-', text)
  text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
  for meaning, (light, _) in PALETTE.items():
    text = text.replace(light, f"var(--{meaning})")
  head = f'<svg role="img" aria-label="{_attribute(label)}" '
  text = re.sub(r'<svg width="[^"]*" height="[^"]*" ', head, text, count=1)
  return re.sub(r"\n\s*", "\n", text)


def variables(theme: int) -> str:
  """The palette as CSS declarations; theme 0 is light, 1 is dark."""
  return " ".join(f"--{meaning}: {colors[theme]};" for meaning, colors in PALETTE.items())


def tint(values: np.ndarray, color: str, strength: float = 0.9) -> np.ndarray:
  """Shares 0 .. 1 as one colour of rising opacity, [*shape, 4]: an image that reads on any background."""
  rgba = np.empty((*values.shape, 4))
  rgba[..., :3] = matplotlib.colors.to_rgb(color)
  rgba[..., 3] = np.clip(values, 0, 1) * strength
  return rgba


def data_uri(content: bytes, kind: str) -> str:
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _attribute(text: str) -> str:
  return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
