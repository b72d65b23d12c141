"""The whole report from made-up numbers: its sections, its numbers, and that it needs nothing from outside."""

import csv
import html.parser
import json
import re

import numpy as np
import pytest
import scipy.stats

from tests.report import synthetic
from zeda_jax.errors import ZedaError
from zeda_jax.report import report as reports
from zeda_jax.report import speed, tables
from zeda_jax.report.style import PALETTE


def make(directory, collected):
  return reports.write(reports.gather(collected, None, None, None, "a model"), directory)


class Reader(html.parser.HTMLParser):
  """All elements with their attributes, and the text."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.text, self.open = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_data(self, data):
    self.text.append(data)


@pytest.fixture(scope="module")
def page(whole):
  return Reader((whole[0] / "index.html").read_text())


def rows(directory, name):
  with (directory / f"{name}.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def test_every_section_is_there(page):
  sections = [a["id"] for tag, a in page.elements if tag == "section"]
  assert sections == [
    *("results", "evaluation", "dial", "training", "where", "uncertainty", "tokens", "load", "speed", "method")
  ]
  links = {a["href"] for tag, a in page.elements if tag == "a" and a["href"].startswith("#")}
  assert links == {f"#{name}" for name in sections}


def test_every_figure_has_its_files(whole, page):
  directory, _ = whole
  figures = {a["id"].removeprefix("fig-") for tag, a in page.elements if tag == "figure"}
  assert figures >= {
    *("quality", "dial", "dial-distance", "training-loss", "training-ratio", "training-layers", "layer-position"),
    *("layers", "token-kinds", "ratio-entropy", "ratio-gap", "correlations", "expert-load", "load-balance"),
    *("speedup", "flops"),
  }
  for name in figures:
    assert (directory / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert rows(directory, name)
  linked = {a["href"] for tag, a in page.elements if tag == "a" and not a["href"].startswith("#")}
  assert linked == {f"{name}.{kind}" for name in figures for kind in ("png", "csv")}


def test_nothing_is_fetched(whole, page):
  text = (whole[0] / "index.html").read_text()
  for tag, attributes in page.elements:
    assert tag not in ("script", "iframe", "object", "embed"), tag
    for name in ("src", "srcset", "href", "xlink:href", "data"):
      value = attributes.get(name)
      if value and not (tag == "a" and name == "href"):
        assert value.startswith(("data:", "#")), (tag, name, value[:60])
  assert "http://" not in text and "https://" not in text
  assert not re.search(r"@import|url\((?!#)", text)


def test_ids_are_unique_and_meet_their_references(whole, page):
  text = (whole[0] / "index.html").read_text()
  ids = [a["id"] for _, a in page.elements if "id" in a]
  assert len(ids) == len(set(ids))
  assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
  assert {a["xlink:href"][1:] for tag, a in page.elements if tag == "use"} <= set(ids)


def test_colours_follow_the_theme(whole):
  text = (whole[0] / "index.html").read_text()
  figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
  for meaning, (light, dark) in PALETTE.items():
    assert light not in figures, meaning
    assert f"--{meaning}: {dark}" in text
  assert "var(--ink)" in figures and "var(--student)" in figures


def test_names_are_escaped(page, whole):
  assert "What a <model> skips" in "".join(page.text)
  assert "<a&b>" in "".join(page.text)
  assert "<model>" not in (whole[0] / "index.html").read_text()


def test_headline_table(page):
  cells = [text.strip() for text in page.text if text.strip()]
  first = cells.index("teacher")
  assert cells[first : first + 4] == ["teacher", "92.00", "90.00", "91.00 ± 1.00"]
  for label in ("injected, untrained", "SFT", "student (exported)", "my-baseline"):
    assert label in cells


def test_evaluation_table(page):
  cells = [text.strip() for text in page.text if text.strip()]
  at = cells.index("GSM8K")
  assert cells[at : at + 9] == ["GSM8K", "100", "avg@1", "90.00 ± 3.00", "90.00", "120", "0.500", "0.510", "0.520"]


def test_dial(whole):
  points = rows(whole[0], "dial")
  assert [float(p["r_ze_response"]) for p in points] == pytest.approx(list(synthetic.RATIOS))
  assert [float(p["zero_expert_bias"]) for p in points] == [float(b) for b in synthetic.BIASES]
  report = json.loads((whole[0] / "report.json").read_text())
  assert report["dial_is_monotone"] is True
  assert len(report["dial"]) == 6


def test_correlations(whole):
  directory, collected = whole
  texts, found = collected.texts, {(r["measure"], r["among"]): r for r in rows(directory, "correlations")}
  answers = texts.in_response
  for name in ("entropy", "gap", "reverse_kl"):
    x, y = getattr(collected.tokens, name)[answers], collected.ratio[answers]
    assert float(found[name, "all"]["spearman"]) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-6)
    assert float(found[name, "all"]["pearson"]) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-6)
  math, code = (found["entropy", family] for family in ("math", "code"))
  assert float(math["spearman_high"]) < -0.5
  assert float(code["spearman_low"]) < 0 < float(code["spearman_high"])
  summary = json.loads((directory / "report.json").read_text())
  verdicts = {(c["measure"], c["among"]): c["sign"] for c in summary["correlations"]}
  assert (verdicts["entropy", "math"], verdicts["entropy", "code"]) == ("negative", "undecided")


def test_layers_and_positions(whole):
  directory, collected = whole
  texts = collected.texts
  for line in rows(directory, "layer-position"):
    layer = int(line["layer"]) - 1  # layer 0 is dense
    first, last = int(line["first_position"]), int(line["last_position"])
    here = texts.is_pass & (texts.position >= first) & (texts.position <= last)
    assert float(line["r_ze"]) == pytest.approx(collected.tokens.zero_picks[layer, here].mean() / 4, rel=1e-6)
    assert int(line["tokens"]) == here.sum()
  mean = {(r["layer"], r["passes"]): float(r["r_ze"]) for r in rows(directory, "layers")}
  expected = collected.tokens.zero_picks[2, texts.in_response].mean() / 4
  assert mean["3", "passes of the answer"] == pytest.approx(expected, rel=1e-6)


def test_kinds(whole):
  directory, collected = whole
  texts, kinds = collected.texts, collected.kinds
  found = {(r["tokens"], r["kind"]): float(r["r_ze"]) for r in rows(directory, "token-kinds")}
  predicted = np.flatnonzero(texts.in_response & np.append(kinds[1:] == 2, False))
  assert found["answer predicted", "digits"] == pytest.approx(collected.ratio[predicted].mean())
  read = texts.is_pass & (texts.position < np.repeat(texts.prompt_lengths, texts.lengths) - 1) & (kinds == 2)
  assert found["prompt read", "digits"] == pytest.approx(collected.ratio[read].mean())


def test_load(whole):
  directory, collected = whole
  for line in rows(directory, "expert-load"):
    layer, expert = int(line["layer"]) - 1, int(line["expert"])
    for name, load in (("load_before", collected.tokens.teacher_load), ("load_after", collected.tokens.load[:, :8])):
      assert float(line[name]) == pytest.approx(load[layer, expert] / load[layer].mean())


def test_coloured_tokens(whole, page):
  directory, collected = whole
  lines = [r for r in rows(directory, "coloured-tokens") if r["example"] == "1"]
  start, end = collected.texts.starts[:2]
  assert lines[0]["r_ze"] == ""
  assert [float(r["r_ze"]) for r in lines[1:]] == pytest.approx(collected.ratio[start : end - 1].tolist())
  prompt = int(collected.texts.prompt_lengths[0])
  assert [r["part"] for r in lines] == ["prompt"] * prompt + ["answer"] * (len(lines) - prompt)
  tips = [a["title"] for tag, a in page.elements if tag == "span" and "title" in a]
  assert f"r_ZE {100 * float(lines[1]['r_ze']):.0f} %" in tips[1]


def test_speed(whole):
  cells = {(r["stage"], r["length"]): r for r in rows(whole[0], "speedup")}
  assert {length for _, length in cells} == {"1024", "2048", "3072", "4096"}
  assert float(cells["prefill", "1024"]["measured"]) == 1.21
  assert cells["prefill", "2048"]["measured"] == ""
  expected = speed.theoretical_speedup(synthetic.CONFIG, 2048, 0.5, "decode")
  assert float(cells["decode", "2048"]["theory"]) == pytest.approx(expected)


def test_training_curves(whole, page):
  lines = rows(whole[0], "training-ratio")
  assert [line["stage"] for line in lines] == ["sft"] * 8 + ["opd"] * 5
  assert {float(line["zero_ratio/response"]) for line in lines} == {0.45}


def test_one_checkpoint_without_labels(tmp_path):
  """What was not measured is left out; drawn again, the files are the same."""
  collected = synthetic.collected(30, labelled=False, teacher=False)
  files = make(tmp_path, collected)
  page = Reader((tmp_path / "index.html").read_text())
  sections = [a["id"] for tag, a in page.elements if tag == "section"]
  assert sections == ["dial", "where", "uncertainty", "tokens", "speed", "method"]
  figures = {a["id"] for tag, a in page.elements if tag == "figure"}
  assert not figures & {"fig-quality", "fig-dial-distance", "fig-ratio-gap", "fig-expert-load"}
  assert {r["measure"] for r in rows(tmp_path, "correlations")} == {"entropy"}
  content = {file: file.read_bytes() for file in files}
  assert make(tmp_path, collected) == files
  assert {file: file.read_bytes() for file in files} == content
  assert not list(tmp_path.glob(".*"))


def test_two_checkpoints_and_one_family(tmp_path):
  one = {"families": ["all"], "family": np.zeros(30, int)}
  make(tmp_path, synthetic.collected(30, **one, teacher_graded=synthetic.row(0.92, 0.0)))
  page = Reader((tmp_path / "index.html").read_text())
  cells = [text.strip() for text in page.text if text.strip()]
  assert cells[cells.index("teacher") :][3] == "92.00 ± 1.00"
  assert {r["among"] for r in rows(tmp_path, "correlations")} == {"all"}


def test_broken_files_are_named(tmp_path):
  bench = tmp_path / "bench.csv"
  bench.write_text("a,b\n1,2\n")
  with pytest.raises(ZedaError, match=r"bench\.csv is not a result of `zeda bench model`"):
    speed.read_bench(bench)
  (tmp_path / "evaluate-x").mkdir()
  (tmp_path / "evaluate-x" / "results.json").write_text('{"tasks": {"a": {}}}')
  with pytest.raises(ZedaError, match=r"results\.json is not a result of `zeda evaluate`"):
    tables.evaluation_tables(tmp_path)
