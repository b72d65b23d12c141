"""A plan as tables on a terminal, as Markdown, and as JSON."""

import json
from typing import Any

import rich.box
import rich.console
import rich.table

from zeda_jax.plan.chips import GIB
from zeda_jax.plan.generation import EnginePlan
from zeda_jax.plan.plan import Plan
from zeda_jax.plan.roofline import EFFICIENCY, Times

_RULE = f"step = max(compute at {EFFICIENCY:.0%} of peak, HBM, weights' traffic) + rows' traffic; nothing was run"


def as_json(plan: Plan, suggestion: tuple[dict[str, Any], Plan] | None = None) -> dict[str, Any]:
  """All numbers of a plan; bytes, FLOPs and seconds of one device."""
  fields = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
  fields |= {
    "fits": plan.fits,
    "idle_devices": plan.idle_devices,
    "traffic": [s._asdict() for s in plan.traffic],
    "times": _times_as_json(plan.times),
    "step_flops": {r: plan.step_flops(r) for r in plan.flops},
    "tokens_per_second_per_chip": {r: plan.tokens_per_second_per_chip(r) for r in plan.times},
  }
  if suggestion is not None:
    fields["suggestion"] = {"changes": suggestion[0], "plan": as_json(suggestion[1])}
  return fields


def show(plan: Plan, console: rich.console.Console) -> None:
  """The tables."""
  say = lambda text: console.print(text, highlight=False)
  mesh = " x ".join(f"{name}={size}" for name, size in plan.mesh.items())
  say(
    f"{plan.model}, {plan.stage} on {plan.topology} ({plan.chips} chips), mesh {mesh}  [{plan.source}]".replace(
      "[", r"\["
    )
  )
  say(f"  {rows_line(plan)}")
  _show_memory(plan, console)
  ratios = list(plan.flops)
  table = _table("TFLOPs of one device and step", *(f"r_ZE {r}" for r in ratios))
  for kind in plan.flops[ratios[0]]:
    table.add_row(kind, *(f"{plan.flops[r][kind] / 1e12:.1f}" for r in ratios))
  table.add_row("all", *(f"{sum(plan.flops[r].values()) / 1e12:.1f}" for r in ratios))
  table.add_row("all devices", *(f"{plan.step_flops(r) / 1e12:.0f}" for r in ratios))
  console.print(table)
  table = _table("sent by one device in a step, r_ZE 0", "group", "GB")
  for s in plan.traffic:
    if s.bytes >= 5e5:
      table.add_row(s.kind, str(s.group), f"{s.bytes / 1e9:.2f}")
  console.print(table)
  table = _table("seconds", *(f"r_ZE {r}" for r in ratios))
  for name in ("compute", "memory", "weights", "rows", "step"):
    table.add_row(name, *(f"{getattr(plan.times[r], name):.3f}" for r in ratios))
  table.add_row("tokens/s/chip", *(f"{plan.tokens_per_second_per_chip(r):.0f}" for r in ratios))
  console.print(table)
  say(f"  {_RULE}")


def rows_line(plan: Plan) -> str:
  """How the rows lie on the devices, and which devices have none."""
  each = plan.padded_rows // plan.devices
  text = f"{plan.rows} rows of {plan.row_length} tokens, {each} a device"
  if plan.padded_rows > plan.rows:
    text += f" after adding {plan.padded_rows - plan.rows} empty ones"
  if plan.idle_devices:
    size = "prompts_per_step" if plan.stage == "opd" else "batch_size"
    flag = f"--config.{plan.stage}.{size}"
    text += f"; {plan.idle_devices} of {plan.devices} devices are idle: raise {flag}"
  return text


def engine_as_json(plan: EnginePlan, suggestion: tuple[dict[str, Any], EnginePlan] | None = None) -> dict[str, Any]:
  """All numbers of a plan of the engine; bytes, FLOPs and seconds of one device."""
  fields = {name: getattr(plan, name) for name in EnginePlan.__dataclass_fields__}
  fields |= {"fits": plan.fits, "room": plan.room}
  fields["programs"] = {
    name: {
      "tokens": program.tokens,
      "temporaries": program.temporaries,
      "flops": program.flops,
      "traffic": [s._asdict() for s in program.traffic],
      "times": _times_as_json(program.times),
      "tokens_per_second_per_chip": {r: plan.tokens_per_second_per_chip(name, r) for r in program.times},
    }
    for name, program in plan.programs.items()
  }
  if suggestion is not None:
    fields["suggestion"] = {"changes": suggestion[0], "plan": engine_as_json(suggestion[1])}
  return fields


def show_engine(plan: EnginePlan, console: rich.console.Console) -> None:
  """The tables of a plan of the engine."""
  say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
  mesh = " x ".join(f"{name}={size}" for name, size in plan.mesh.items())
  what = f"{plan.model}, {plan.kind}, rollout on {plan.topology} ({plan.chips} chips), mesh {mesh}"
  say(f"{what}  [{plan.source}]")
  filled = f" ({plan.asked} asked)" if plan.asked != plan.slots else ""
  say(f"  {plan.slots} slots{filled} of {plan.prompt} + {plan.new} tokens, {plan.slots // plan.devices} a device")
  _show_memory(plan, console)
  room = plan.room
  full = f"{room['slots']} slots of {plan.prompt + plan.new}"
  say(f"  room in all for {room['tokens']} cached tokens, which is {full}, or more of shorter sequences")
  ratios = list(plan.programs["decode"].times)
  read = f"prefill: {plan.prompts} prompts in rows of {plan.bucket}"
  for name, title in (("prefill", read), ("decode", f"decode: one token for {plan.slots} slots, at half length")):
    program = plan.programs[name]
    table = _table(f"{title}, seconds", *(f"r_ZE {r}" for r in ratios))
    for part in ("compute", "memory", "weights", "rows", "step"):
      table.add_row(part, *(f"{getattr(program.times[r], part):.4f}" for r in ratios))
    table.add_row("tokens/s/chip", *(f"{plan.tokens_per_second_per_chip(name, r):.0f}" for r in ratios))
    table.add_row("TFLOPs of one device", *(f"{sum(program.flops[r].values()) / 1e12:.3f}" for r in ratios))
    console.print(table)
  say(f"  {_RULE}")


def _show_memory(plan: Plan | EnginePlan, console: rich.console.Console) -> None:
  verdict = "fits" if plan.fits else "DOES NOT FIT"
  text = f"  {verdict}: needs {plan.needed / GIB:.1f} GiB of {plan.available / GIB:.1f} a device"
  console.print(text, highlight=False)
  table = _table("bytes of one device", "GiB")
  for kind, value in plan.memory.items():
    table.add_row(kind, f"{value / GIB:.2f}")
  console.print(table)


def _times_as_json(times: dict[str, Times]) -> dict[str, Any]:
  return {r: t._asdict() | {"step": t.step, "bound": t.bound} for r, t in times.items()}


def show_fewer_slots(found: tuple[dict[str, Any], EnginePlan] | None, console: rich.console.Console) -> None:
  """The number of slots that fits, as a flag."""
  if found is None:
    text = "Not even one slot a device fits: take more chips, or a lower --config.rollout.max_new_tokens."
  else:
    changes, plan = found
    flags = " ".join(f"--config.{name}={value}" for name, value in changes.items())
    text = f"fits with {flags} ({plan.needed / GIB:.1f} GiB, {plan.source})"
  console.print(f"  {text}", highlight=False, soft_wrap=True)


def show_suggestion(found: tuple[dict[str, Any], Plan] | None, console: rich.console.Console) -> None:
  """The change that makes it fit, as flags."""
  if found is None:
    tried = "remat, accumulate, opd.overlap, mesh.expert, trainable=router"
    text = f"No change tried makes it fit ({tried}): take more chips."
  else:
    changes, plan = found
    flags = " ".join(f"--config.{name}={value}" for name, value in changes.items())
    text = f"fits with {flags} ({plan.needed / GIB:.1f} GiB, {plan.source}; {plan.times['0.5'].step:.2f} s at r_ZE 0.5)"
  console.print(f"  {text}", highlight=False, soft_wrap=True)


def show_faster(plan: Plan | None, console: rich.console.Console) -> None:
  """The mesh whose steps are shorter, if there is one."""
  if plan is not None:
    seconds, gib = plan.times["0.5"].step, plan.needed / GIB
    text = (
      f"by estimate --config.mesh.expert={plan.mesh['expert']} is faster: {seconds:.2f} s at r_ZE 0.5, {gib:.1f} GiB"
    )
    console.print(f"  {text}", highlight=False, soft_wrap=True)


def _table(*columns: str) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for i, name in enumerate(columns):
    table.add_column(name, justify="left" if i == 0 else "right")
  return table


def dumps(value: dict[str, Any]) -> str:
  return json.dumps(value, indent=2)
