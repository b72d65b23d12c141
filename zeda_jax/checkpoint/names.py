"""The table between tensor names on disk and parameters of the model.

One `Row` per kind of tensor. Another architecture is another tuple of rows (and letters in `dims`, where its shapes
need them); reading, writing, validation and the directory transforms all follow from the rows.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from zeda_jax.checkpoint.safetensors_io import TensorSpec
from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError

Path = tuple[str | int, ...]

LAYER = "model.layers.{layer}."
EXPERT = LAYER + "mlp.experts.{expert}."


def _always(config: ModelConfig) -> bool:
  return True


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of tensor: its name on disk, its parameter, and how one becomes the other.

  Attributes:
    name: on disk; `{layer}` and `{expert}` stand for numbers.
    path: the parameter, below `runs.{r}` if the name has a layer. Parameters are stacked [layers, experts, ...].
    shape: on disk, in the letters of `dims`.
    transpose: the parameter holds the transposed matrix.
    part: (place, count) where several tensors share a parameter, side by side on its last axis.
    zero_path: the parameter of the rows from N on, where zero experts widen this tensor.
    float32: stays float32 where the others are read as another dtype.
    kind: "moe" or "dense" where only those layers have the tensor.
    when: whether a model has the tensor at all.
  """

  name: str
  path: str
  shape: str
  transpose: bool = False
  part: tuple[int, int] = (0, 1)
  zero_path: str | None = None
  float32: bool = False
  kind: str | None = None
  when: Callable[[ModelConfig], bool] = _always


def _attention_bias(config: ModelConfig) -> bool:
  return config.attention_bias


def _untied(config: ModelConfig) -> bool:
  return not config.tie_word_embeddings


def _direct_queries(config: ModelConfig) -> bool:
  return config.mla is not None and config.mla.q_lora_rank is None


def _latent_queries(config: ModelConfig) -> bool:
  return config.mla is not None and config.mla.q_lora_rank is not None


def _latent_query_bias(config: ModelConfig) -> bool:
  return _latent_queries(config) and config.attention_bias


def _projection(
  name: str, path: str, shape: str, kind: str | None = None, when: Callable[[ModelConfig], bool] = _always
) -> Row:
  return Row(LAYER + name + ".weight", path + ".kernel", shape, transpose=True, kind=kind, when=when)


def _projection_bias(name: str, path: str, shape: str, when: Callable[[ModelConfig], bool] = _attention_bias) -> Row:
  return Row(LAYER + name + ".bias", path + ".bias", shape, when=when)


_BEFORE_LAYERS = (Row("model.embed_tokens.weight", "embed.embedding", "V H"),)
_GQA = (
  _projection("self_attn.q_proj", "attention.q_proj", "Q H"),
  _projection("self_attn.k_proj", "attention.k_proj", "KV H"),
  _projection("self_attn.v_proj", "attention.v_proj", "KV H"),
  _projection("self_attn.o_proj", "attention.o_proj", "H Q"),
  _projection_bias("self_attn.q_proj", "attention.q_proj", "Q"),
  _projection_bias("self_attn.k_proj", "attention.k_proj", "KV"),
  _projection_bias("self_attn.v_proj", "attention.v_proj", "KV"),
  _projection_bias("self_attn.o_proj", "attention.o_proj", "H"),
)
_HEAD_NORMS = (
  Row(LAYER + "self_attn.q_norm.weight", "attention.q_norm.scale", "D"),
  Row(LAYER + "self_attn.k_norm.weight", "attention.k_norm.scale", "D"),
)
_PROJECTION_NORMS = (
  Row(LAYER + "self_attn.q_norm.weight", "attention.q_norm.scale", "Q"),
  Row(LAYER + "self_attn.k_norm.weight", "attention.k_norm.scale", "KV"),
)
_MLA = (
  _projection("self_attn.q_proj", "attention.q_proj", "Q H", when=_direct_queries),
  _projection("self_attn.q_a_proj", "attention.q_a_proj", "QR H", when=_latent_queries),
  _projection_bias("self_attn.q_a_proj", "attention.q_a_proj", "QR", when=_latent_query_bias),
  Row(LAYER + "self_attn.q_a_layernorm.weight", "attention.q_a_norm.scale", "QR", when=_latent_queries),
  _projection("self_attn.q_b_proj", "attention.q_b_proj", "Q QR", when=_latent_queries),
  _projection("self_attn.kv_a_proj_with_mqa", "attention.kv_a_proj", "C H"),
  _projection_bias("self_attn.kv_a_proj_with_mqa", "attention.kv_a_proj", "C"),
  Row(LAYER + "self_attn.kv_a_layernorm.weight", "attention.kv_a_norm.scale", "KR"),
  _projection("self_attn.kv_b_proj", "attention.kv_b_proj", "KVB KR"),
  _projection("self_attn.o_proj", "attention.o_proj", "H O"),
  _projection_bias("self_attn.o_proj", "attention.o_proj", "H"),
)
_NORMS = (
  Row(LAYER + "input_layernorm.weight", "input_norm.scale", "H"),
  Row(LAYER + "post_attention_layernorm.weight", "post_attention_norm.scale", "H"),
)
_MOE = (
  Row(LAYER + "mlp.gate.weight", "mlp.router.weight", "R H", zero_path="mlp.router.zero_weight", kind="moe"),
  Row(EXPERT + "gate_proj.weight", "mlp.experts.gate_up", "F H", transpose=True, part=(0, 2), kind="moe"),
  Row(EXPERT + "up_proj.weight", "mlp.experts.gate_up", "F H", transpose=True, part=(1, 2), kind="moe"),
  Row(EXPERT + "down_proj.weight", "mlp.experts.down", "H F", transpose=True, kind="moe"),
)
_CORRECTION = (
  Row(
    LAYER + "mlp.gate.e_score_correction_bias",
    "mlp.router.correction_bias",
    "R",
    zero_path="mlp.router.zero_correction_bias",
    float32=True,
    kind="moe",
  ),
)
_SHARED = (
  _projection("mlp.shared_experts.gate_proj", "mlp.shared_experts.gate_proj", "S H", kind="moe"),
  _projection("mlp.shared_experts.up_proj", "mlp.shared_experts.up_proj", "S H", kind="moe"),
  _projection("mlp.shared_experts.down_proj", "mlp.shared_experts.down_proj", "H S", kind="moe"),
)
_DENSE = (
  _projection("mlp.gate_proj", "mlp.gate_proj", "I H", kind="dense"),
  _projection("mlp.up_proj", "mlp.up_proj", "I H", kind="dense"),
  _projection("mlp.down_proj", "mlp.down_proj", "H I", kind="dense"),
)
_AFTER_LAYERS = (
  Row("model.norm.weight", "final_norm.scale", "H"),
  Row("lm_head.weight", "lm_head.kernel", "V H", transpose=True, when=_untied),
)

TABLES: dict[str, tuple[Row, ...]] = {
  "qwen3_moe": (*_BEFORE_LAYERS, *_GQA, *_HEAD_NORMS, *_NORMS, *_MOE, *_DENSE, *_AFTER_LAYERS),
  "glm4_moe_lite": (*_BEFORE_LAYERS, *_MLA, *_NORMS, *_MOE, *_CORRECTION, *_SHARED, *_DENSE, *_AFTER_LAYERS),
  "olmoe": (*_BEFORE_LAYERS, *_GQA, *_PROJECTION_NORMS, *_NORMS, *_MOE, *_AFTER_LAYERS),
}


def dims(config: ModelConfig) -> dict[str, int]:
  """The letters of the table's shapes."""
  sizes = {
    "V": config.vocab_size,
    "H": config.hidden_size,
    "D": config.head_dim,
    "Q": config.num_heads * config.head_dim,
    "KV": config.num_kv_heads * config.head_dim,
    "I": config.intermediate_size,
    "F": config.moe_intermediate_size,
    "N": config.num_experts,
    "R": config.num_experts + config.num_zero_experts,
    "S": config.num_shared_experts * config.moe_intermediate_size,
  }
  if config.mla is not None:
    mla = config.mla
    sizes |= {
      "QR": mla.q_lora_rank or 0,
      "KR": mla.kv_lora_rank,
      "C": mla.kv_lora_rank + mla.rope_head_dim,
      "KVB": config.num_heads * (mla.nope_head_dim + mla.v_head_dim),
      "O": config.num_heads * mla.v_head_dim,
    }
  return sizes


@dataclasses.dataclass(frozen=True)
class Piece:
  """The part of a parameter that one tensor fills.

  `parameter[index][..., columns]` is the tensor's rows from `first_row` on, transposed if `transpose`.
  """

  path: Path
  index: tuple[int, ...]
  first_row: int
  rows: int | None
  columns: tuple[int, int]
  transpose: bool


@dataclasses.dataclass(frozen=True)
class HfTensor:
  """One tensor of a checkpoint: name and shape on disk, the row it comes from, and the parameters it fills.

  `layer` counts from 0 over the whole model. A zero expert of a plain export has no pieces: it is all zeros.
  """

  name: str
  shape: tuple[int, ...]
  row: Row
  layer: int | None
  pieces: tuple[Piece, ...]


def hf_tensors(config: ModelConfig, plain: bool = False) -> dict[str, HfTensor]:
  """Every tensor that a checkpoint of `config` holds, by name, in the order of the model.

  Args:
    config: the model.
    plain: list the zero experts' tensors, too, as the plain-engine format stores them.
  """
  rows = TABLES[config.model_type]
  first_in_layer = next(i for i, row in enumerate(rows) if "{layer}" in row.name)
  tensors = [_expand(config, row, None, (), None, "") for row in rows[:first_in_layer] if row.when(config)]
  for number, run in enumerate(config.layer_runs):
    for place in range(run.length):
      tensors.extend(_layer_tensors(config, rows, number, run.start + place, place, plain))
  after = [row for row in rows[first_in_layer:] if "{layer}" not in row.name and row.when(config)]
  tensors.extend(_expand(config, row, None, (), None, "") for row in after)
  return {tensor.name: tensor for tensor in tensors}


def _layer_tensors(
  config: ModelConfig, rows: Sequence[Row], run: int, layer: int, place: int, plain: bool
) -> Iterator[HfTensor]:
  kind = "moe" if config.moe_layers[layer] else "dense"
  here = [row for row in rows if "{layer}" in row.name and row.kind in (None, kind) and row.when(config)]
  prefix = f"runs.{run}."
  for row in here:
    if "{expert}" not in row.name:
      yield _expand(config, row, layer, (place,), None, prefix)
  per_expert = [row for row in here if "{expert}" in row.name]
  for expert in range(config.num_experts + (config.num_zero_experts if plain else 0)):
    for row in per_expert:
      yield _expand(config, row, layer, (place, expert), expert, prefix)


def _expand(
  config: ModelConfig, row: Row, layer: int | None, index: tuple[int, ...], expert: int | None, prefix: str
) -> HfTensor:
  sizes = dims(config)
  shape = tuple(sizes[letter] for letter in row.shape.split())
  place, _ = row.part
  width = shape[0] if row.transpose else shape[-1]
  columns = (place * width, (place + 1) * width)
  pieces: tuple[Piece, ...] = ()
  if row.zero_path is not None and config.is_dynamic:
    normal, zero = config.num_experts, config.num_zero_experts
    # The rows of a vector are its last axis.
    widths = [(0, count) if len(shape) == 1 else columns for count in (normal, zero)]
    pieces = (
      Piece(_path(prefix + row.path), index, 0, normal, widths[0], row.transpose),
      Piece(_path(prefix + row.zero_path), index, normal, zero, widths[1], row.transpose),
    )
  elif expert is None or expert < config.num_experts:
    pieces = (Piece(_path(prefix + row.path), index, 0, None, columns, row.transpose),)
  return HfTensor(row.name.format(layer=layer, expert=expert), shape, row, layer, pieces)


def _path(text: str) -> Path:
  return tuple(int(part) if part.isdigit() else part for part in text.split("."))


def parameter_pieces(tensors: Mapping[str, HfTensor]) -> dict[Path, list[tuple[HfTensor, Piece]]]:
  """Groups the pieces by the parameter they fill."""
  grouped: dict[Path, list[tuple[HfTensor, Piece]]] = {}
  for tensor in tensors.values():
    for piece in tensor.pieces:
      grouped.setdefault(piece.path, []).append((tensor, piece))
  return grouped


def piece_shape(tensor: HfTensor, piece: Piece) -> tuple[int, ...]:
  """Shape of `parameter[index][..., columns]`."""
  rows = tensor.shape[0] if piece.rows is None else piece.rows
  shape = (rows, *tensor.shape[1:])
  return shape[::-1] if piece.transpose else shape


def parameter_shape(pieces: Sequence[tuple[HfTensor, Piece]]) -> tuple[int, ...]:
  """Shape of the parameter that these pieces fill together."""
  lead = tuple(max(numbers) + 1 for numbers in zip(*(piece.index for _, piece in pieces), strict=True))
  last = max(piece.columns[1] for _, piece in pieces)
  return (*lead, *piece_shape(*pieces[0])[:-1], last)


def is_ignored(name: str, config: ModelConfig) -> bool:
  """Tensors that may lie in a checkpoint without being part of the model.

  Those are layers past num_hidden_layers (multi-token prediction), a head stored although tied to the embedding, and
  the rotary frequencies that old checkpoints carry.
  """
  layer = re.match(r"model\.layers\.(\d+)\.", name)
  if layer is not None and int(layer[1]) >= config.num_layers:
    return True
  return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def check_tensors(stored: Mapping[str, TensorSpec], config: ModelConfig, where: Any) -> dict[str, HfTensor]:
  """Compares the tensors on disk with those `config` asks for and returns the latter.

  Raises:
    ZedaError: tensors are missing, unexpected, of the wrong shape or not of a float dtype; names all kinds at once.
  """
  expected = hf_tensors(config)
  missing = [name for name in expected if name not in stored]
  unexpected = [name for name in stored if name not in expected and not is_ignored(name, config)]
  both = [(tensor, stored[name]) for name, tensor in expected.items() if name in stored]
  shapes = [
    f"{tensor.name} {list(found.shape)} instead of {list(tensor.shape)}"
    for tensor, found in both
    if found.shape != tensor.shape
  ]
  dtypes = [f"{t.name} {found.dtype}" for t, found in both if found.dtype not in ("F64", "F32", "F16", "BF16")]
  findings = [
    f"{len(names)} {what} ({_some(names)})"
    for names, what in (
      (missing, "missing"),
      (unexpected, "unexpected"),
      (shapes, "of the wrong shape"),
      (dtypes, "of a dtype that is not supported"),
    )
    if names
  ]
  if findings:
    raise ZedaError(
      f"The tensors in {where} do not fit its config.json: {', '.join(findings)}; "
      "use the config.json that belongs to these weights, or download them again."
    )
  return expected


def _some(names: Sequence[str], shown: int = 3) -> str:
  return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
