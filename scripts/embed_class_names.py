"""Class names -> class vectors, to be given as --config.method.class_vectors.

python scripts/embed_class_names.py --weights=DIFFUSERS_FOLDER --names=names.txt --output=vectors.npz
python scripts/embed_class_names.py --weights=DIFFUSERS_FOLDER --names=wall,floor,dining_table --output=vectors.npz \
    --templates="a photo of a {}"

The order of the names is the order of the class ids. Written are `class_vectors`, float32 [names, width], and `names`.
"""

import argparse

from vpd_jax.monitoring import progress

if __name__ == "__main__":
  progress.begin("embed_class_names")  # before imports that take seconds

import jax.numpy as jnp
import numpy as np

from vpd_jax.checkpoints import class_name_encoding
from vpd_jax.config import presets
from vpd_jax.errors import Parser, UserError, one_line
from vpd_jax.files import atomic, paths, reading
from vpd_jax.models.backbones.clip_text import TextSizes


def parse() -> argparse.Namespace:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--weights", required=True, help="diffusers folder, or a single file of Stable Diffusion")
  parser.add_argument(
    "--size", default="full", choices=presets.sizes(), help="of a single file: full is 1.x, sd21 is 2.x"
  )
  parser.add_argument("--names", required=True, help="a .txt file with one name a line, or names between commas")
  parser.add_argument("--output", required=True, help=".npz file to write")
  parser.add_argument("--templates", default="imagenet_80", help="a set of prompt_templates.json, or a text with {}")
  parser.add_argument("--max_length", type=int, default=20, help="tokens a text is cut or padded to")
  parser.add_argument("--tokenizer", help="folder with vocab.json and merges.txt; default: that of the weights")
  return parser.parse_args()


def read_names(argument: str) -> list[str]:
  """The names of a file or of the argument itself, none empty."""
  if argument.lower().endswith(".txt"):
    listed = reading.read_text(argument, called=f"--names={argument!r}").splitlines()
  else:
    listed = argument.split(",")
  return [name.strip() for name in listed if name.strip()]


def embed(args: argparse.Namespace) -> None:
  output = paths.local(args.output, "--output")
  if output.suffix != ".npz":
    raise UserError(f"--output={args.output!r} must end in '.npz'; rename it.")
  names, templates = read_names(args.names), class_name_encoding.read_templates(args.templates)
  if not names:
    raise UserError(f"--names={args.names!r} holds no name; give a .txt file with one a line, or names between commas.")
  tokenizer = class_name_encoding.load_tokenizer(args.tokenizer or args.weights)
  sizes = TextSizes(**presets.backbone(args.size)["text"])
  with progress.phase("load weights"):
    text = class_name_encoding.load_text_encoder(args.weights, dtype=jnp.float32, sizes=sizes)
  vectors = class_name_encoding.encode(
    names, tokenizer=tokenizer, text=text, templates=templates, max_length=args.max_length
  )
  atomic.write(output, lambda path: np.savez(path, class_vectors=vectors, names=np.array(names)))
  progress.write(f"wrote {output}: {vectors.shape[0]} names, width {vectors.shape[1]}, {len(templates)} templates")


def main() -> None:
  try:
    embed(parse())
  except UserError as error:
    raise SystemExit(f"embed_class_names: {one_line(error)}") from error


if __name__ == "__main__":
  main()
