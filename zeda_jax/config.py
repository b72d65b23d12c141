"""ModelConfig: one architecture description, read from and written to config.json."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from zeda_jax.architectures import ARCHITECTURES, Fields, MLAConfig
from zeda_jax.errors import ZedaError

if TYPE_CHECKING:  # sharding imports JAX, which reading a config.json need not wait for
  from zeda_jax.sharding import Sharding

__all__ = ["LayerRun", "MLAConfig", "ModelConfig", "RopeConfig", "from_hf", "read_config", "to_hf"]

# Dynamic checkpoints (zero experts in the router) carry their own model_type so that an engine that does not
# know zero experts refuses them instead of reading a router that is too wide.
DYNAMIC_SUFFIX = "_plus_plus"

# What a pick beyond the N normal experts gives: nothing, or (MoE++, a baseline) the token's own hidden state.
ZERO_EXPERT_TYPES = ("zero", "copy")

# What the backward pass computes again instead of keeping it from the forward pass, from fast to small:
#   none    nothing
#   dots    all but the results of dense products (projections, router) and of attention; experts are recomputed
#   layer   whole layers: only what goes from one to the next is kept
REMAT = ("none", "dots", "layer")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding; `type` is "default" or "yarn" (the fields below it are yarn's)."""

  theta: float = 10000.0
  type: str = "default"
  factor: float | None = None
  original_max_position_embeddings: int | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True


class LayerRun(NamedTuple):
  """Consecutive layers of one kind; their parameters are stacked and the run is one scan."""

  is_moe: bool
  start: int
  length: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and routing of a (static or dynamic) MoE decoder. Hashable, so it can be static under jit.

  `moe_layers[i]` says whether layer i is a mixture of experts or one dense MLP.
  `num_zero_experts` is N_Z: 0 for a static model; ids N .. N+N_Z-1 are zero experts.
  """

  model_type: str
  vocab_size: int
  hidden_size: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  intermediate_size: int
  moe_intermediate_size: int
  num_experts: int
  num_experts_per_tok: int
  moe_layers: tuple[bool, ...]
  num_zero_experts: int = 0
  # The router (see zero_experts.route):
  scoring: str = "softmax"  # or "sigmoid", whose picks a correction bias per expert decides with the score
  norm_topk_prob: bool = True
  routed_scaling_factor: float = 1.0  # of the routed experts' output
  num_groups: int = 1  # the normal experts lie in so many equal groups,
  top_groups: int = 1  # of which a token may pick from the best so many
  num_shared_experts: int = 0  # that every token takes, as one MLP of their common width
  # Attention:
  mla: MLAConfig | None = None  # multi-head latent attention; head_dim is then nope_head_dim + rope_head_dim
  qk_norm: str = "head"  # RMS norm of queries and keys over each "head" or over the whole "projection"
  clip_qkv: float | None = None  # queries, keys and values are cut to -clip_qkv .. clip_qkv
  rms_norm_eps: float = 1e-6
  rope: RopeConfig = RopeConfig()
  attention_bias: bool = False
  tie_word_embeddings: bool = False
  max_position_embeddings: int = 32768
  dtype: str = "float32"  # of the activations; parameters carry their own
  remat: str = "none"  # what the backward pass recomputes instead of storing it: see REMAT
  scan_unroll: int = 1  # layers per iteration of the scan; small models run faster unrolled
  stack_layers: bool = True  # False: every layer is a run of its own, and its parameters arrays of their own
  sharding: "Sharding | None" = None  # over which devices the model is spread, and how; None means it is not
  # Baselines, as routing options (see zero_experts.route); the first two are trained, the others need no training:
  zero_expert_type: str = "zero"  # of ZERO_EXPERT_TYPES
  renormalize: bool = False  # the weights of the normal picks are scaled up to the sum of all K
  execute_top_k: int | None = None  # run only the best k of the K picks; weights stay normalised over all K
  skip_threshold: float = 0.0  # beta: drop picks whose probability is below beta x the best pick's, renormalise
  # Where the model came from; not part of its identity.
  eos_token_ids: tuple[int, ...] = dataclasses.field(default=(), compare=False)
  hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
  source: str | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    if self.remat not in REMAT:
      raise ZedaError(f"remat is {self.remat!r}; expected one of {', '.join(map(repr, REMAT))}.")
    if self.zero_expert_type not in ZERO_EXPERT_TYPES:
      expected = ", ".join(map(repr, ZERO_EXPERT_TYPES))
      raise ZedaError(f"zero_expert_type is {self.zero_expert_type!r}; expected one of {expected}.")

  @property
  def num_layers(self) -> int:
    return len(self.moe_layers)

  @property
  def layer_runs(self) -> tuple[LayerRun, ...]:
    """The layers as runs of equal kind, in order; Qwen3-30B-A3B is one run of 48."""
    runs: list[LayerRun] = []
    for i, is_moe in enumerate(self.moe_layers):
      if self.stack_layers and runs and runs[-1].is_moe == is_moe:
        runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
      else:
        runs.append(LayerRun(is_moe, i, 1))
    return tuple(runs)

  @property
  def is_dynamic(self) -> bool:
    return self.num_zero_experts > 0

  @property
  def rope_dim(self) -> int:
    """Dimensions of a head that carry the rotary embedding."""
    return self.head_dim if self.mla is None else self.mla.rope_head_dim

  def replace(self, **changes: Any) -> "ModelConfig":
    return dataclasses.replace(self, **changes)


def read_config(path: str | pathlib.Path) -> ModelConfig:
  """Reads `config.json` of a Hugging Face directory.

  Raises:
    ZedaError: the file is missing or unreadable, or describes a model that is not supported.
  """
  folder = pathlib.Path(path)
  file = folder / "config.json"
  if not file.is_file():
    raise ZedaError(f"{file} does not exist: expected a Hugging Face model directory with a config.json.")
  raw = _read_json(file)
  config = from_hf(raw, where=str(file)).replace(source=str(folder.resolve()))
  generation = folder / "generation_config.json"
  eos = (_read_json(generation) if generation.is_file() else {}).get("eos_token_id", raw.get("eos_token_id"))
  eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
  return config.replace(eos_token_ids=eos_ids)


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(file.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ZedaError(f"{file} is not valid JSON ({error}): download it again or restore it.") from error
  if not isinstance(value, dict):
    raise ZedaError(f"{file} holds a {type(value).__name__}; expected a JSON object.")
  return value


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
  """Builds a ModelConfig from a parsed config.json in the dialect of transformers 4 or 5.

  Raises:
    ZedaError: a field is missing or has a value this package does not implement.
  """
  model_type = raw.get("model_type")
  base_type = str(model_type).removesuffix(DYNAMIC_SUFFIX)
  if base_type not in ARCHITECTURES:
    known = ", ".join(t for base in ARCHITECTURES for t in (base, base + DYNAMIC_SUFFIX))
    raise ZedaError(f"{where}: model_type is {model_type!r}; supported are {known}.")

  architecture, fields = ARCHITECTURES[base_type], Fields(raw, where)
  fields.only("hidden_act", "silu")
  num_experts = fields.whole(*architecture.experts_keys)
  zero_experts = _zero_experts(raw, where, model_type != base_type)
  top_k = fields.whole("num_experts_per_tok")
  if top_k > num_experts:
    raise ZedaError(f"{where}: num_experts_per_tok is {top_k}, more than the {num_experts} experts there are.")
  config = ModelConfig(
    model_type=base_type,
    vocab_size=fields.whole("vocab_size"),
    hidden_size=fields.whole("hidden_size"),
    num_heads=fields.whole("num_attention_heads"),
    num_experts=num_experts,
    num_experts_per_tok=top_k,
    num_zero_experts=zero_experts,
    zero_expert_type=raw["zce_types"][0] if zero_experts else "zero",
    renormalize=bool(raw.get("zce_renormalize", False)),
    rope=_rope(raw, where),
    attention_bias=bool(raw.get("attention_bias", False)),
    tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    max_position_embeddings=fields.whole("max_position_embeddings"),
    dtype=_dtype(raw, where),
    hf_config=dict(raw),
    **architecture.read(fields),
  )
  if config.num_heads % config.num_kv_heads:
    raise ZedaError(
      f"{where}: num_attention_heads ({config.num_heads}) is not a multiple of num_key_value_heads "
      f"({config.num_kv_heads})."
    )
  return config


def _zero_experts(raw: Mapping[str, Any], where: str, dynamic: bool) -> int:
  nums, types = raw.get("zce_nums"), raw.get("zce_types")
  if not dynamic:
    if nums:
      raise ZedaError(f"{where}: zce_nums is {nums!r} but model_type names a static model; expected {DYNAMIC_SUFFIX}.")
    return 0
  if types not in [[kind] for kind in ZERO_EXPERT_TYPES]:
    raise ZedaError(f'{where}: zce_types is {types!r}; supported are ["zero"] and ["copy"].')
  if not (isinstance(nums, list) and len(nums) == 1 and isinstance(nums[0], int) and nums[0] > 0):
    raise ZedaError(f"{where}: zce_nums is {nums!r}; expected a list of one positive whole number.")
  return nums[0]


def _rope(raw: Mapping[str, Any], where: str) -> RopeConfig:
  # transformers 5 nests everything in rope_parameters; 4 has rope_theta beside an optional rope_scaling, which model
  # cards tell users to add by hand: where both are there, rope_scaling is the one that was meant.
  given = {**(raw.get("rope_parameters") or {}), **(raw.get("rope_scaling") or {})}
  if raw.get("rope_scaling"):
    given["rope_type"] = raw["rope_scaling"].get("rope_type", raw["rope_scaling"].get("type", "default"))
  kind = given.get("rope_type", given.get("type", "default"))
  theta = given.get("rope_theta", raw.get("rope_theta", 10000.0))
  if kind == "default":
    return RopeConfig(theta=float(theta))
  if kind != "yarn":
    raise ZedaError(f"{where}: rope type is {kind!r}; supported are default and yarn.")
  original = given.get("original_max_position_embeddings") or raw["max_position_embeddings"]
  factor = given.get("factor") or raw["max_position_embeddings"] / original
  fields = {k: given[k] for k in ("attention_factor", "mscale", "mscale_all_dim") if given.get(k) is not None}
  return RopeConfig(
    theta=float(theta),
    type="yarn",
    factor=float(factor),
    original_max_position_embeddings=int(original),
    beta_fast=float(given.get("beta_fast") or 32),
    beta_slow=float(given.get("beta_slow") or 1),
    truncate=bool(given.get("truncate", True)),
    **fields,
  )


def _dtype(raw: Mapping[str, Any], where: str) -> str:
  dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
  if dtype not in ("float32", "bfloat16", "float16"):
    raise ZedaError(f"{where}: dtype is {dtype!r}; supported are float32, bfloat16 and float16.")
  return dtype


def to_hf(config: ModelConfig, format: str = "dynamic") -> dict[str, Any]:
  """The config.json of `config`: the source's own fields, changed only where zero experts need it.

  Args:
    config: the model's configuration.
    format: "dynamic" (zero experts named in zce_nums; a static model stays static) or "plain" (a static model with
      N + N_Z experts, whose last N_Z have all-zero tensors on disk; any engine loads it).

  Raises:
    ZedaError: another format, or a plain one that cannot say what the model does.
  """
  if format not in ("dynamic", "plain"):
    raise ZedaError(f"format is {format!r}; expected 'dynamic' or 'plain'.")
  if format == "plain" and config.is_dynamic and config.num_groups > 1:
    raise ZedaError(
      f"The model picks from {config.top_groups} of {config.num_groups} groups of experts (n_group), and its zero "
      "experts belong to none, which a static checkpoint cannot say: export the dynamic format."
    )
  if format == "plain" and config.is_dynamic and (config.zero_expert_type != "zero" or config.renormalize):
    what = "copy experts" if config.zero_expert_type == "copy" else "weights that are renormalised without zero experts"
    raise ZedaError(f"The model has {what}, which a static checkpoint cannot say: export the dynamic format.")
  architecture = ARCHITECTURES[config.model_type]
  raw = dict(config.hf_config) or _fields_to_hf(config)
  for key in ("zce_nums", "zce_types", "zce_renormalize", "use_zce_mask"):
    raw.pop(key, None)
  plain = config.is_dynamic and format == "plain"
  num_experts = config.num_experts + (config.num_zero_experts if plain else 0)
  present = [key for key in architecture.experts_keys if key in raw] or architecture.experts_keys[:1]
  raw.update(model_type=config.model_type, architectures=[architecture.class_name(dynamic=False)])
  raw.update(dict.fromkeys(present, num_experts), num_experts_per_tok=config.num_experts_per_tok)
  if config.is_dynamic and not plain:
    raw.update(
      model_type=config.model_type + DYNAMIC_SUFFIX,
      architectures=[architecture.class_name(dynamic=True)],
      zce_nums=[config.num_zero_experts],
      zce_types=[config.zero_expert_type],
      **({"zce_renormalize": True} if config.renormalize else {}),
      use_zce_mask=False,
    )
  return raw


def _fields_to_hf(config: ModelConfig) -> dict[str, Any]:
  """A config.json from the fields alone, for models that did not come from a directory."""
  raw: dict[str, Any] = {
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "hidden_act": "silu",
    "norm_topk_prob": config.norm_topk_prob,
    "rms_norm_eps": config.rms_norm_eps,
    "rope_theta": config.rope.theta,
    "attention_bias": config.attention_bias,
    "tie_word_embeddings": config.tie_word_embeddings,
    "max_position_embeddings": config.max_position_embeddings,
    "torch_dtype": config.dtype,
    **ARCHITECTURES[config.model_type].write(config),
  }
  if config.rope.type != "default":
    scaling = {k: v for k, v in dataclasses.asdict(config.rope).items() if v is not None and k not in ("theta", "type")}
    raw["rope_scaling"] = {"rope_type": config.rope.type, **scaling}
  return raw
