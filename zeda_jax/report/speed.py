"""FLOPs, and the speed they promise beside what was measured (paper, Table 13)."""

import csv
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zeda_jax.analysis.flops import decode_flops, prefill_flops, theoretical_speedup
from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError
from zeda_jax.report import style
from zeda_jax.report.picture import Picture, percent

PAPER_LENGTHS = tuple(range(1024, 8193, 1024))
STAGES = ("prefill", "decode")


class Measured(NamedTuple):
  """One cell of `zeda bench model`."""

  stage: str
  length: int
  zero_ratio: float
  speedup: float
  theory: float


def read_bench(file: pathlib.Path) -> list[Measured]:
  """The rows of a CSV that `zeda bench model --output=DIR` wrote, or of a JSON list of objects with the same names.

  Raises:
    ZedaError: the file is neither.
  """
  try:
    text = file.read_text()
    rows = json.loads(text) if file.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    rows = rows.get("rows", rows) if isinstance(rows, dict) else rows
    return [
      Measured(str(r["stage"]), int(r["length"]), *(float(r[name]) for name in ("zero_ratio", "speedup", "theory")))
      for r in rows
    ]
  except (KeyError, TypeError, ValueError) as error:
    raise ZedaError(
      f"--bench: {file} is not a result of `zeda bench model` ({error!r}): expected a CSV with the columns stage, "
      "length, zero_ratio, speedup and theory."
    ) from error


def lengths_for(config: ModelConfig) -> tuple[int, ...]:
  """The paper's lengths that fit the context, or powers of two below it where none does."""
  fitting = tuple(length for length in PAPER_LENGTHS if length <= config.max_position_embeddings)
  if fitting:
    return fitting
  highest = int(math.log2(config.max_position_embeddings))
  return tuple(2**i for i in range(max(highest - 4, 0), highest + 1))


def speedup_rows(
  config: ModelConfig, ratio_all: float, ratio_response: float, bench: Sequence[Measured] = ()
) -> list[dict[str, Any]]:
  """One row per stage and length: theory at r_ZE 0.5, theory at the ratio the student has there, and what was measured.

  Reading a prompt skips what all passes skip, and decoding what the passes of the answers skip.
  """
  by_cell = {(m.stage, m.length): m for m in bench}
  lengths = sorted({*lengths_for(config), *(m.length for m in bench)})
  rows = []
  for stage, ratio in zip(STAGES, (ratio_all, ratio_response), strict=True):
    for length in lengths:
      measured = by_cell.get((stage, length))
      rows.append(
        {
          "stage": stage,
          "length": length,
          "theory_at_half": theoretical_speedup(config, length, 0.5, stage),
          "r_ze": ratio,
          "theory": theoretical_speedup(config, length, ratio, stage),
          **(
            {}
            if measured is None
            else {
              "measured_r_ze": measured.zero_ratio,
              "measured": measured.speedup,
              "theory_of_measured": measured.theory,
            }
          ),
        }
      )
  return rows


def speed_pictures(config: ModelConfig, rows: Sequence[Mapping[str, Any]], ratio_response: float) -> list[Picture]:
  return [_speedup_picture(rows), _flops_picture(config, rows, ratio_response)]


def _speedup_picture(rows: Sequence[Mapping[str, Any]]) -> Picture:
  figure, (axes,) = style.new_figure()
  for stage, color in zip(STAGES, (style.STUDENT, style.BASELINE), strict=True):
    mine = [row for row in rows if row["stage"] == stage]
    x = [row["length"] for row in mine]
    axes.plot(x, [row["theory"] for row in mine], color=color, label=f"{stage}, theory")
    axes.plot(x, [row["theory_at_half"] for row in mine], color=color, linestyle=(0, (1, 2.2)), linewidth=1.2)
    known = [row for row in mine if "measured" in row]
    if known:
      axes.plot(
        [row["length"] for row in known],
        [row["measured"] for row in known],
        color=color,
        marker="o",
        linestyle="none",
        label=f"{stage}, measured",
      )
  axes.axhline(1, color=style.MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
  axes.set_xlabel("tokens read (prefill) or generated (decode)")
  axes.set_ylabel("speed-up of one MoE layer")
  style.legend_above(axes)
  prefill, decode = (next(row for row in rows if row["stage"] == stage) for stage in STAGES)
  caption = (
    f"FLOPs of the static layer over those of the dynamic one (paper, Appendix D), at the student's r_ZE: "
    f"{percent(prefill['r_ze'])} for prefill, {percent(decode['r_ze'])} for decode; dotted at 50 %. "
    f"At {prefill['length']} tokens {prefill['theory']:.2f} and {decode['theory']:.2f}."
  )
  return Picture("speedup", "Speed-up", caption, figure, [dict(row) for row in rows])


def _flops_picture(config: ModelConfig, rows: Sequence[Mapping[str, Any]], ratio: float) -> Picture:
  """Where the FLOPs of a generated token go, before and after."""
  figure, (axes,) = style.new_figure()
  lengths = sorted({int(row["length"]) for row in rows})
  shown = [lengths[0], lengths[len(lengths) // 2], lengths[-1]] if len(lengths) > 2 else lengths
  parts = {"experts": style.STUDENT, "shared": style.GREEN, "router": style.GOLD, "attention": style.GREY}
  table: list[dict[str, Any]] = []
  ticks, at = [], 0.0
  for length in shown:
    static, zero = config.replace(num_zero_experts=0), 0.0
    for config_, r, name in ((static, zero, "static"), (config, ratio, "dynamic")):
      flops = decode_flops(config_, length, r)
      base = 0.0
      for part, color in parts.items():
        value = getattr(flops, part) / length / 1e6
        axes.bar(
          at, value, bottom=base, width=0.8, color=color, linewidth=0, label=part if not table and value else None
        )
        base += value
      prefill = prefill_flops(config_, length, r)
      table.append({"length": length, "layer": name, "r_ze": r, "decode_flops": flops.total,
                    "prefill_flops": prefill.total, **{f"decode_{p}": getattr(flops, p) for p in parts}})  # fmt: skip
      ticks.append((at, name))
      at += 0.92
    axes.text(
      at - 1.38, -0.17, f"{length} tokens", transform=axes.get_xaxis_transform(), ha="center", color=style.MUTED
    )
    at += 0.5
  axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
  axes.grid(False, axis="x")
  axes.set_ylabel("MFLOPs of a layer per generated token")
  style.legend_above(axes, columns=4)
  caption = (
    f"One MoE layer while decoding, at r_ZE {percent(ratio)}: the experts' FLOPs fall to {percent(1 - ratio)}, the "
    "router's rise with its rows, attention stays."
  )
  return Picture("flops", "Where the FLOPs go", caption, figure, table)


def seconds_note(rows: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
  """What the seconds of the evaluation say, and what they do not."""
  timed = {name: float(row["seconds"]) for name, row in rows.items() if row.get("seconds")}
  if "teacher" not in timed or "student" not in timed:
    return ""
  text = (
    f"Generating the held-out answers took {timed['teacher']:.1f} s with the teacher and {timed['student']:.1f} s with "
    f"the student, {timed['teacher'] / timed['student']:.2f} times the speed. These are single runs, with attention, "
    "sampling and padding in them, on a machine that may have been busy"
  )
  alike: dict[float, list[float]] = {}
  for name, row in rows.items():
    if name in timed:
      alike.setdefault(round(float(row["skipped_response"]), 2), []).append(timed[name])
  spread = [(min(t), max(t)) for t in alike.values() if len(t) > 1]
  if spread:
    low, high = max(spread, key=lambda pair: pair[1] / pair[0])
    text += f": rows that skip the same share took {low:.1f} to {high:.1f} s"
  return text + ". `zeda bench model` measures speed itself; give its CSV as --bench."
