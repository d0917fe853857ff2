"""Loads weights from any source, `config.init.pretrained` -> {name: array}, and saves converted directories.

fetch.py locates the source (local, hub, bucket), formats/ reads its files.

A converted directory holds `arrays/<part>` (orbax) and `manifest.json`, which records the source and the conversion.
"""

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vpd_jax.convert import fetch
from vpd_jax.convert.formats import weight_files
from vpd_jax.convert.formats.lazy_tensor import LazyTensor
from vpd_jax.convert.rules import COUNTER, ConversionError, NotFinite, Report, Same, Shaped, convert
from vpd_jax.convert.tables import released, stable_diffusion
from vpd_jax.errors import UserError
from vpd_jax.files import atomic, paths, read_errors, reading
from vpd_jax.types import Fields

ACCEPTED = (
  "a diffusers folder (unet/ and vae/), a CompVis .ckpt or .safetensors, the authors' .pth, a directory written by "
  "scripts/convert_checkpoint.py, or a hub id (org/name@revision)"
)
# Models by the width of the UNet's context, and the name suffix of the layer that reads it, in the source and in ours.
MODELS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
ATTENDED = ("attn2.to_k.weight", "attn2/to_k/kernel")
NETWORKS = ("unet", "vae")  # The networks of a diffusers folder that are loaded.
# Arrays that no Stable Diffusion source contains.
OUTSIDE_SD = (r"^/(?!method/(unet|vae)/)",)
PACKAGES = ("vpd_jax", "jax", "numpy", "orbax-checkpoint", "ml_dtypes")
PART_BYTES = 1 << 28  # Orbax copies what it saves; saving in parts bounds the size of the copy.


def load_pretrained(
  path: str | epath.PathLike,
  targets: Mapping[str, Shaped],
  fresh: Iterable[str] = OUTSIDE_SD,
  *,
  aligned: bool = False,
) -> tuple[dict[str, np.ndarray], Report]:
  """Loads weights of any format as arrays by our names, on the host.

  Args:
    path: see ACCEPTED.
    targets: shape and dtype by name of every array of the model: trained, frozen and statistics.
    fresh: regular expressions, searched in "/" + name, of arrays that a Stable Diffusion source need not contain. The
      authors' checkpoints must contain all arrays.
    aligned: see `rules.convert`.

  Returns:
    The loaded arrays, in the dtypes of `targets`, and a report that lists the arrays left at their initial values.

  Raises:
    ValueError: for an unknown or damaged source, or one of another Stable Diffusion version; ConversionError, which
      lists all problems, for one that does not fit the model.
  """
  kind, weights = _open(path)
  if weights is None:
    saved, arrays = manifest(path), _restore(path)
    _check_model(path, arrays, targets)
    allowed = released.CLIP if saved["table"].startswith("released:") else fresh
    named, report = convert(
      arrays, [Same()], targets, fresh=allowed, aligned=aligned, table=f"ours, from {saved['table']}"
    )
    return named, dataclasses.replace(report, step=saved["step"])
  _check_model(path, weights.tensors, targets)
  release = kind.removeprefix("released:")
  if release in released.TABLES:
    rules, fresh = released.TABLES[release](), released.CLIP
  elif kind == "compvis":
    rules = stable_diffusion.compvis(targets)
  else:
    rules = stable_diffusion.diffusers(weights.tensors, targets)
  tensors = released.named_for(release, weights.tensors, targets)
  try:
    named, report = convert(tensors, rules, targets, fresh=fresh, aligned=aligned, table=kind)
  except ConversionError as error:
    raise ConversionError(f"{path}: {error}; give weights of the network that the config describes.") from error
  except NotFinite as error:
    raise NotFinite(f"{path}: {error}") from error
  others = {name: f"not a tensor, but {what}" for name, what in weights.others.items()}
  return named, dataclasses.replace(report, dropped=report.dropped | others, step=_steps(weights.tensors))


def _check_model(path: str | epath.PathLike, source: Mapping[str, Shaped], targets: Mapping[str, Shaped]) -> None:
  """Raises if source and model are different entries of MODELS."""
  last = lambda name: -1 if name.endswith(ATTENDED[0]) else 0
  widths, needed = (
    {x.shape[last(n)] for n, x in named.items() if n.endswith(ATTENDED) and len(x.shape) == 2}
    for named in (source, targets)
  )
  if widths != needed and len(widths) == len(needed) == 1 and widths | needed <= MODELS.keys():
    (width,), (expected,) = widths, needed
    raise UserError(
      f"{path} holds {MODELS[width]} (a context {width} wide), the config describes {MODELS[expected]} ({expected}); "
      "give weights of the latter, or in the config's words the size of the former: full is 1.x, sd21 is 2.x."
    )


def source_files(path: str | epath.PathLike) -> dict[str, str]:
  """{file name: sha256} of the files that `load_pretrained` reads; of the original files for a converted directory."""
  kind, weights = _open(path)
  if weights is None:
    return manifest(path)["files"]
  root = weights.files[0].parents[1 if kind == "diffusers" else 0]
  return {file.relative_to(root).as_posix(): weight_files.sha256(file) for file in weights.files}


def check_output(output: str | epath.PathLike) -> epath.Path:
  """The absolute path of a converted directory, a local folder or a bucket.

  Raises:
    ValueError: if it exists, or orbax could not read it back.
  """
  output = _absolute(output)
  if output.exists():
    raise UserError(f"output={str(output)!r} exists already; choose another name or remove it.")
  paths.check_name(output, "output")
  return output


def save(
  output: str | epath.PathLike, named: Mapping[str, np.ndarray], report: Report, sources: Mapping[str, str]
) -> None:
  """Writes a converted directory atomically.

  Args:
    output: must not exist yet.
    named: arrays by our names.
    report: of the conversion.
    sources: {file name: sha256}.

  Raises:
    ValueError: if `output` exists, or orbax could not read it back.
  """
  output = check_output(output)
  content = {
    "table": report.table,
    "step": report.step,
    "files": dict(sources),
    "used": len(report.used),
    "dropped": len(report.dropped),
    "fresh": list(report.fresh),
    "arrays": len(named),
    "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
  }
  with atomic.beside(output) as unfinished:
    (unfinished / "arrays").mkdir(parents=True)
    for i, part in enumerate(_parts(named)):
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(unfinished / "arrays" / f"{i:03}", args=ocp.args.PyTreeSave(part))
    (unfinished / "manifest.json").write_text(atomic.to_json(content, indent=1))


def manifest(path: str | epath.PathLike) -> Fields:
  """manifest.json of a converted directory.

  Raises:
    ValueError: if it is not a converted directory.
  """
  file = _absolute(path) / "manifest.json"
  try:
    content = reading.read_json(file)
    return content | {"table": str(content["table"]), "step": int(content["step"])}
  except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{file} is not the manifest of converted weights ({error}); convert them again.") from error


def _open(path: str | epath.PathLike) -> tuple[str, weight_files.Weights | None]:
  """(kind, unread tensors) of a source, with kind diffusers, compvis or released:NAME; ("ours", None) if converted."""
  source = fetch.bucket(str(path)) if fetch.in_bucket(path) else _absolute(path)
  if (source / "manifest.json").exists() and (source / "arrays").is_dir():
    return "ours", None
  local_path = fetch.local(path, NETWORKS)
  if not local_path.exists():
    raise UserError(f"weights {str(path)!r} does not exist; give {ACCEPTED}.")
  if all((local_path / part).is_dir() for part in NETWORKS):
    return "diffusers", weight_files.open_folder(local_path, NETWORKS)
  if local_path.is_dir():
    raise UserError(f"weights {str(path)!r} is a folder without unet/ and vae/; give {ACCEPTED}.")
  weights = weight_files.open_file(local_path)
  prefixes = {prefix: f"released:{name}" for name, prefix in released.SIGNATURES.items()} | {
    "model.diffusion_model.": "compvis"
  }
  for prefix, kind in prefixes.items():
    if any(name.startswith(prefix) for name in weights.tensors):
      return kind, weights
  examples = list(weights.tensors)[:3]
  raise UserError(f"weights {str(path)!r} holds names of no known kind, like {examples}; give {ACCEPTED}.")


def _steps(tensors: Mapping[str, LazyTensor]) -> int:
  """The step count of the BatchNorms; 0 if there is none or it is not finite, as after a cast to float16."""
  counts = [np.asarray(x, np.float64).ravel() for name, x in tensors.items() if name.endswith(f".{COUNTER}")]
  return max((int(x[0]) for x in counts if x.size == 1 and np.isfinite(x[0]) and x[0] >= 0), default=0)


def _parts(named: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
  """The arrays in parts of at most PART_BYTES, or of one array."""
  part, size = {}, 0
  for name, array in named.items():
    if part and size + array.nbytes > PART_BYTES:
      yield part
      part, size = {}, 0
    part[name], size = array, size + array.nbytes
  yield part


def _restore(path: str | epath.PathLike) -> dict[str, np.ndarray]:
  """All arrays of a converted directory, on the host."""
  named = {}
  folder = _absolute(path)
  paths.check_name(folder, "weights")
  errors = read_errors.explained(f"weights {path}", folder, "and convert them again")
  with errors, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    arrays = folder / "arrays"
    for part in (arrays / name for name in reading.visible(part.name for part in arrays.iterdir())):
      names = ocp.PyTreeCheckpointHandler().metadata(part).tree  # a Checkpointer would hide the cause of an error
      arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
      named |= reader.restore(part, args=ocp.args.PyTreeRestore(restore_args=arguments))
  return named


def _absolute(path: str | epath.PathLike) -> epath.Path:
  """An absolute path, as orbax requires."""
  return epath.Path(path) if "://" in str(path) else epath.Path(pathlib.Path(path).expanduser().resolve())
