"""The page: one HTML file with everything in it."""

import dataclasses
import importlib.resources
import re
from collections.abc import Sequence

import jinja2
import markupsafe

from zeda_jax import __version__
from zeda_jax.report import style
from zeda_jax.report.coloured import Coloured
from zeda_jax.report.picture import Picture
from zeda_jax.report.tables import Table


@dataclasses.dataclass(frozen=True)
class Tile:
  """A number at the top of the page."""

  value: str
  what: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page; what is empty is not shown."""

  id: str
  title: str
  text: str = ""
  tables: Sequence[tuple[str, Table]] = ()
  pictures: Sequence[Picture] = ()
  examples: Sequence[Coloured] = ()
  facts: Sequence[tuple[str, str]] = ()

  @property
  def layout(self) -> str:
    """How the figures are set: "pair" beside each other, "three" in a row, or one wide and one narrow ("split")."""
    wide, narrow = (sum(picture.wide == of for picture in self.pictures) for of in (True, False))
    return "split" if (wide, narrow) == (1, 1) else "three" if narrow == 3 else "pair"

  @property
  def is_empty(self) -> bool:
    return not (self.tables or self.pictures or self.examples or self.facts)


def _svg(picture: Picture) -> markupsafe.Markup:
  return markupsafe.Markup(style.svg(picture.figure, picture.name, f"{picture.title}. {picture.caption}"))


def _code(text: str) -> markupsafe.Markup:
  """Escaped text whose `commands` are set as code."""
  return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def render(title: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
  """The HTML text; sections without content are left out."""
  source = importlib.resources.files("zeda_jax.report").joinpath("page.html").read_text(encoding="utf-8")
  environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
  environment.filters["code"] = _code
  return environment.from_string(source).render(
    title=title,
    lead=lead,
    tiles=tiles,
    sections=[section for section in sections if not section.is_empty],
    light=markupsafe.Markup(style.variables(0)),
    dark=markupsafe.Markup(style.variables(1)),
    svg=_svg,
    version=__version__,
  )
