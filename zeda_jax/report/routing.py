"""Where work is skipped: by layer and position, by kind of token; and how loaded the experts are, before and after."""

import matplotlib
import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zeda_jax.analysis.collect import Collected
from zeda_jax.analysis.statistics import Interval, means
from zeda_jax.analysis.token_kinds import KINDS
from zeda_jax.report import style
from zeda_jax.report.picture import Picture, percent

_MOST_POSITIONS = 64  # columns of the heat map
_FEWEST_TOKENS = 30  # of a cell that is shown


def moe_layers(collected: Collected) -> list[int]:
  """The numbers of the MoE layers in the model."""
  return [layer for layer, is_moe in enumerate(collected.config.moe_layers) if is_moe]


def layer_pictures(collected: Collected) -> list[Picture]:
  return [_position_picture(collected), _layer_picture(collected)]


def _position_picture(collected: Collected) -> Picture:
  """The paper's Figure 5."""
  texts, top_k = collected.texts, collected.config.num_experts_per_tok
  position, passes = texts.position, texts.is_pass
  width = -(-(int(position[passes].max()) + 1) // _MOST_POSITIONS)
  columns = position // width
  count = int(columns[passes].max()) + 1
  tokens = np.bincount(columns[passes], minlength=count)
  answers = np.bincount(columns[texts.in_response], minlength=count)
  picks = np.stack([np.bincount(columns[passes], layer[passes], count) for layer in collected.tokens.zero_picks])
  with np.errstate(invalid="ignore", divide="ignore"):
    ratio, answer_share = picks / (tokens * top_k), answers / tokens
  shown = int(np.flatnonzero(tokens >= _FEWEST_TOKENS).max(initial=0)) + 1
  layers = moe_layers(collected)
  figure = Figure(figsize=(7.4, 1.7 + min(0.32 * len(layers), 3.0)), layout="constrained")
  heights = [max(len(layers), 3), 0.5 if len(layers) < 12 else 1.5]
  axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=heights)
  edges = (-0.5, shown * width - 0.5, len(layers) - 0.5, -0.5)
  low, high = np.nanmin(ratio[:, :shown]), np.nanmax(ratio[:, :shown])
  image = axes.imshow(
    100 * ratio[:, :shown],
    aspect="auto",
    cmap=style.HEAT,
    vmin=100 * low,
    vmax=100 * high,
    extent=edges,
    interpolation="none",
  )
  ticks = sorted({0, *range(0, len(layers), max(1, len(layers) // 6)), len(layers) - 1})
  axes.set_yticks(ticks, [str(layers[t]) for t in ticks])
  axes.set_ylabel("layer")
  strip.imshow(
    style.tint(answer_share[None, :shown], style.STUDENT),
    aspect="auto",
    extent=(*edges[:2], 0, 1),
    interpolation="none",
  )
  strip.set_yticks([0.5], ["answer"])
  strip.set_xlabel("position in the text (token)")
  for each in (axes, strip):
    each.grid(False)
  _color_bar(figure, image, axes, "r_ZE (%)")
  rows = [
    {
      "layer": layer,
      "first_position": column * width,
      "last_position": (column + 1) * width - 1,
      "r_ze": float(ratio[place, column]),
      "tokens": int(tokens[column]),
      "answer_share": float(answer_share[column]),
    }
    for place, layer in enumerate(layers)
    for column in range(shown)
    if tokens[column]
  ]
  by_layer = ratio_by_layer(collected)
  caption = (
    f"Share of picks skipped by layer and position (paper, Figure 5); the strip shows how many of the passes there "
    f"write the answer. Layers lie between {percent(min(i.value for i in by_layer))} and "
    f"{percent(max(i.value for i in by_layer))}."
  )
  return Picture("layer-position", "Layer and position", caption, figure, rows, wide=True)


def ratio_by_layer(collected: Collected, responses: bool = False) -> list[Interval]:
  """r_ZE of every MoE layer, over all passes or those that predict the response."""
  texts = collected.texts
  mask = texts.in_response if responses else texts.is_pass
  one = np.zeros(len(texts.tokens), int)
  per_layer = collected.tokens.zero_picks / collected.config.num_experts_per_tok
  return [means(layer, texts.text, one, 1, mask=mask, resamples=400)[0] for layer in per_layer]


def _layer_picture(collected: Collected) -> Picture:
  figure, (axes,) = style.new_figure()
  layers, rows = moe_layers(collected), []
  for responses, color, label in ((False, style.GREY, "all passes"), (True, style.STUDENT, "passes of the answer")):
    values = ratio_by_layer(collected, responses)
    y = np.asarray([[100 * v.value, 100 * v.low, 100 * v.high] for v in values])
    axes.fill_between(layers, y[:, 1], y[:, 2], color=color, alpha=0.2, linewidth=0)
    axes.plot(layers, y[:, 0], color=color, label=label, marker="o" if len(layers) < 25 else None, markersize=4)
    rows += [
      {"layer": layer, "passes": label, "r_ze": v.value, "low": v.low, "high": v.high}
      for layer, v in zip(layers, values, strict=True)
    ]
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
  axes.set_xlabel("layer")
  axes.set_ylabel("picks skipped, r_ZE (%)")
  style.legend_above(axes)
  caption = "r_ZE of every MoE layer, with 95 % intervals."
  return Picture("layers", "Layer by layer", caption, figure, rows)


def kinds_picture(collected: Collected) -> Picture:
  """r_ZE by kind of token: of the token a pass reads, and of the token it predicts."""
  texts, kinds, ratio = collected.texts, collected.kinds.astype(int), collected.ratio
  following = np.append(kinds[1:], 0)
  cases = (
    ("prompt read", kinds, texts.is_pass & ~texts.in_response, style.GREY),
    ("answer read", kinds, _answer_read(collected), style.STUDENT),
    ("answer predicted", following, texts.in_response, style.GREEN),
  )
  found = {
    label: (means(ratio, texts.text, cell, len(KINDS), mask=mask), np.bincount(cell[mask], minlength=len(KINDS)), color)
    for label, cell, mask, color in cases
  }
  shown = [k for k in range(len(KINDS)) if any(counts[k] >= _FEWEST_TOKENS for _, counts, _ in found.values())]
  figure, (axes,) = style.new_figure(4.4, 1.1 + 0.3 * max(len(shown), 6))
  rows = []
  for number, (label, (values, counts, color)) in enumerate(found.items()):
    enough = [(line, k) for line, k in enumerate(shown) if counts[k] >= _FEWEST_TOKENS]
    at = np.asarray([line for line, _ in enough]) + (number - 1) * 0.22
    v = np.asarray([[values[k].value, values[k].low, values[k].high] for _, k in enough]).reshape(-1, 3) * 100
    axes.errorbar(
      v[:, 0], at, xerr=[v[:, 0] - v[:, 1], v[:, 2] - v[:, 0]], fmt="o", color=color, markersize=4.5, label=label
    )
    rows += [
      {"tokens": label, "kind": KINDS[k], "r_ze": values[k].value, "low": values[k].low, "high": values[k].high,
       "count": int(counts[k])}
      for k in range(len(KINDS)) if counts[k]
    ]  # fmt: skip
  axes.set_yticks(range(len(shown)), [KINDS[k] for k in shown])
  axes.invert_yaxis()
  axes.set_xlabel("picks skipped, r_ZE (%)")
  style.legend_above(axes)
  prompt, answer = (float(np.nanmean(ratio[mask])) for mask in (texts.is_pass & ~texts.in_response, texts.in_response))
  caption = (
    f"r_ZE by what the token is, with 95 % intervals; at least {_FEWEST_TOKENS} tokens each. Passes over the prompt "
    f"skip {percent(prompt)}, those that predict the answer {percent(answer)}."
  )
  return Picture("token-kinds", "Kinds of tokens", caption, figure, rows)


def _answer_read(collected: Collected) -> np.ndarray:
  """Passes that read a token of the response (the first of `in_response` reads the prompt's last)."""
  texts = collected.texts
  return texts.is_pass & (texts.position >= np.repeat(texts.prompt_lengths, texts.lengths))


def load_pictures(collected: Collected) -> list[Picture]:
  """Load of every expert before and after, as a multiple of an even share; empty without a teacher."""
  if collected.tokens.teacher_load is None:
    return []
  before, after = relative_loads(collected)
  return [_load_picture(collected, before, after), _rank_picture(before, after)]


def relative_loads(collected: Collected) -> tuple[np.ndarray, np.ndarray]:
  """Picks of every normal expert [L, N] relative to an even share of the layer's executed picks."""
  experts = collected.config.num_experts
  teacher, student = collected.tokens.teacher_load, collected.tokens.load[:, :experts]
  assert teacher is not None
  share = lambda load: experts * load / np.maximum(load.sum(axis=1, keepdims=True), 1)
  return share(teacher), share(student)


def _load_picture(collected: Collected, before: np.ndarray, after: np.ndarray) -> Picture:
  order = np.argsort(-before, axis=1)  # each layer's busiest expert first
  figure = Figure(figsize=(7.0, 1.6 + min(0.3 * len(before), 2.6)), layout="constrained")
  axes = figure.subplots(1, 2, sharey=True)
  highest = float(max(np.quantile(before, 0.995), np.quantile(after, 0.995), 1.5))
  norm = matplotlib.colors.TwoSlopeNorm(1, 0, highest)
  layers = moe_layers(collected)
  for each, load, title in zip(axes, (before, after), ("before: teacher", "after: student"), strict=True):
    image = each.imshow(
      np.take_along_axis(load, order, axis=1),
      aspect="auto",
      cmap=style.HEAT.reversed(),
      norm=norm,
      interpolation="none",
    )
    each.set_title(title, fontsize=9, color=style.INK, loc="left")
    each.set_xlabel("expert, by the teacher's load")
    each.grid(False)
  ticks = sorted({0, *range(0, len(layers), max(1, len(layers) // 6)), len(layers) - 1})
  axes[0].set_yticks(ticks, [str(layers[t]) for t in ticks])
  axes[0].set_ylabel("layer")
  _color_bar(figure, image, list(axes), "load ÷ even share")
  rows = [
    {
      "layer": layer,
      "expert": expert,
      "load_before": float(before[place, expert]),
      "load_after": float(after[place, expert]),
    }
    for place, layer in enumerate(layers)
    for expert in range(before.shape[1])
  ]
  kept = load_correlation(before, after)
  zero = collected.tokens.load[:, collected.config.num_experts :]
  caption = (
    "Load of the normal experts on the same texts, sorted alike on both sides. "
    f"Spearman correlation of the load before and after, mean of the layers: {kept:.2f}. "
    f"The busiest expert of a layer takes {before.max(axis=1).mean():.1f} times an even share before and "
    f"{after.max(axis=1).mean():.1f} times after; {int((after == 0).sum())} of {after.size} experts are idle after "
    f"({int((before == 0).sum())} before). Of {zero.size} zero experts {int((zero == 0).sum())} are never picked."
  )
  return Picture("expert-load", "Expert load before and after", caption, figure, rows, wide=True)


def load_correlation(before: np.ndarray, after: np.ndarray) -> float:
  """Mean over layers of Spearman's correlation between the experts' loads."""
  with np.errstate(invalid="ignore"):
    values = [
      scipy.stats.spearmanr(b, a).statistic for b, a in zip(before, after, strict=True) if np.ptp(b) and np.ptp(a)
    ]
  return float(np.mean(values)) if values else float("nan")


def _rank_picture(before: np.ndarray, after: np.ndarray) -> Picture:
  figure, (axes,) = style.new_figure()
  rank = np.arange(1, before.shape[1] + 1)
  rows = []
  for load, color, label in ((before, style.GREY, "before: teacher"), (after, style.STUDENT, "after: student")):
    ordered = -np.sort(-load, axis=1)
    axes.fill_between(rank, ordered.min(axis=0), ordered.max(axis=0), color=color, alpha=0.16, linewidth=0)
    axes.plot(rank, ordered.mean(axis=0), color=color, label=label)
    rows += [
      {"model": label, "rank": int(r), "load": float(x)} for r, x in zip(rank, ordered.mean(axis=0), strict=True)
    ]
  axes.axhline(1, color=style.MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
  axes.set_ylim(bottom=0)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
  axes.set_xlabel("rank of the expert in its layer")
  axes.set_ylabel("load ÷ even share")
  style.legend_above(axes)
  caption = "The same, each side sorted by its own load: mean over layers, and the range of the layers."
  return Picture("load-balance", "How evenly work is spread", caption, figure, rows)


def _color_bar(figure: Figure, image, axes: Axes | list[Axes], label: str) -> None:
  bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=18)
  bar.outline.set_visible(False)
  bar.set_label(label)
