"""IEDP: implicit and explicit language guidance of Stable Diffusion's UNet as a perception backbone.

Two branches share the UNet, neck and head. *Implicit*: CLIP's frozen image encoder encodes the image; learned queries
attend to its projected tokens, which gives the context of the UNet. *Explicit*, in training only: the labels are
converted to a sentence, which CLIP's frozen text encoder encodes to the context. Evaluation runs the implicit branch
only, without labels and text encoder. The latents and CLIP's tokens are computed once for both. Neck and head are those
of VPD: "fusion" and "deconv" for depth; "fpn" for segmentation, where the attention maps are concatenated to the
features and the sentence consists of the names of the classes in the image. Referring segmentation, which is not part
of the publication, has one branch: each image's adapted sentence followed by the implicit tokens.

No code was released, and the method section of the paper was not accessible: all assumptions are options, which are
listed in `presets.iedp_assumptions()`.

Source: Wang et al. 2024, https://arxiv.org/abs/2404.07600.
"""

from collections.abc import Callable

import jax.numpy as jnp

from vpd_jax.errors import UserError
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.clip_image import RESIZES
from vpd_jax.models.backbones.clip_text import TextSizes
from vpd_jax.models.backbones.unet import UNetSizes
from vpd_jax.models.context.adapters import ResidualAdapter
from vpd_jax.models.context.clip_queries import ClipQueries
from vpd_jax.models.context.context import Context, SentenceThen
from vpd_jax.models.context.label_sentences import LabelSentence
from vpd_jax.models.context.sentences import Sentence
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.diffusion import ConstantTime, DiffusionMethod, MethodSetup
from vpd_jax.types import Array, Batch, Branch, Example, Fields

CHOICES = {
  "prompt": ("image", "sentence+image"),
  "branch_mode": ("both", "implicit"),
  "clip_resize": tuple(RESIZES),
  "clip_features": ("last", "penultimate"),
  "output_norm": ("none", "ln"),
  "text_output": ("last", "pooled"),
  "explicit_adapter": ("residual", "none"),
  "tower_dtype": ("bfloat16", "float32"),
}


class Iedp(DiffusionMethod):
  """Image, and in training a sentence, to the four maps of the UNet."""

  branch = "implicit"

  def __init__(
    self,
    setup: MethodSetup,
    *,
    prompt: str = "image",
    token_length: int = 40,
    branch_mode: str = "both",
    lambda_exp: float = 1.0,
    sentence: str = "a photo of a {}",
    clip_resize: str = "bicubic",
    clip_features: str = "last",
    num_queries: int = 77,
    query_init: float = 0.02,
    num_blocks: int = 1,
    num_heads: int = 8,
    ffn_ratio: int = 4,
    output_norm: str = "none",
    text_output: str = "last",
    explicit_adapter: str = "residual",
    residual_scale: float = 1e-4,
    tower_dtype: str = "bfloat16",
    timestep: int = 1,
    latent_scale: float = 1.0,
    pad_multiple: int = 64,
    pad_value: float = 0.0,
    attention_maps: bool = False,
    attention_max_size: int = 32,
    attention_gradient: bool = False,
  ):
    """Builds the parts, the explicit branch for training only.

    Args:
      setup: see MethodSetup.
      prompt: "image", the branches above; "sentence+image", a single branch with the states of each image's sentence
        followed by the implicit tokens, for referring segmentation (not published).
      token_length: tokens of such a sentence.
      branch_mode: "both", or "implicit" for training without text.
      lambda_exp: weight of the explicit branch's loss; that of the implicit branch is 1.
      sentence: template with {} for the name of the image's class; without {} the same for all images; "names" for the
        names of the classes in the label map, see label_sentences.Names.
      clip_resize: interpolation of CLIP's input, "bicubic" or "bilinear".
      clip_features: "last", the tokens after the last layer, or "penultimate".
      num_queries, query_init: number of learned queries and their initial standard deviation.
      num_blocks, num_heads, ffn_ratio: of the blocks that attend to CLIP's tokens.
      output_norm: "none", or "ln" for a LayerNorm after the last block.
      text_output: "last", all states of the text encoder, or "pooled", that of the end-of-text token.
      explicit_adapter: "residual", C + gamma * adapter(C), as in VPD; or "none".
      residual_scale: initial gamma.
      tower_dtype: storage dtype of CLIP's encoders; they compute in `dtype`.
      timestep, latent_scale, pad_multiple, pad_value, attention_maps, attention_max_size, attention_gradient: see Vpd.

    Raises:
      ValueError: an unknown option, a number out of range, incompatible widths, or a class sentence without classes.
    """
    options = {name: value for name, value in locals().items() if name in OPTIONS}
    _check({**options, "prompt": prompt}, setup.unet, setup.text, maps=attention_maps)
    self._options, self._lambda_exp = tuple(options.items()), float(lambda_exp)
    layer, width = setup.common.layer, setup.unet.context_dim
    towers: LayerOptions = {**layer, "param_dtype": jnp.dtype(tower_dtype)}
    has_sentence, explicit = prompt == "sentence+image", branch_mode == "both" and setup.training
    adapter = explicit_adapter == "residual" and (has_sentence or explicit)
    adapt = ResidualAdapter(width, residual_scale, **layer) if adapter else layers.Identity()
    block = {name: options[name] for name in ("num_queries", "query_init", "num_blocks", "num_heads", "ffn_ratio")}
    block |= {"output_norm": output_norm, "attention": setup.attention, **layer}
    context: Context = ClipQueries(
      setup.image, width, resize=clip_resize, features=clip_features, tower_dtype=jnp.dtype(tower_dtype), **block
    )
    if has_sentence:
      context = SentenceThen(Sentence(setup.text, token_length, width, setup.tokenize, adapt, **towers), context)
    super().__init__(
      setup,
      fit=image_input.PaddedInput(pad_multiple, pad_value),
      context=context,
      time=ConstantTime(timestep),
      latent_scale=latent_scale,
      join=image_input.joined_maps(
        setup.unet, context.tokens[0], use=attention_maps, max_size=attention_max_size, gradient=attention_gradient
      ),
    )
    self.training_only = () if has_sentence else ("text_encoder", "text_adapter", "gamma")
    self.explicit = (
      LabelSentence(
        setup.text, sentence, setup.class_names, setup.tokenize, adapt, pooled=text_output == "pooled", **towers
      )
      if explicit
      else None
    )
    if self.explicit:
      self.needs, self.prepare_inputs = self.explicit.needs, self.explicit.prepare_inputs
      self.prepare_outputs = self.explicit.prepare_outputs

  @property
  def notes(self) -> tuple[str, ...]:
    """Lines for the start-up report: the assumptions."""
    listed = ", ".join(f"{name}={value!r}" for name, value in self._options)
    return (f"IEDP assumptions in force (explained in presets.iedp_assumptions): {listed}",)

  @property
  def prepare(self) -> Callable[[Example], Example]:
    """The host transform of the explicit branch if there is one, else of the context."""
    return (self.explicit or self.context).prepare

  def branches(self, training: bool) -> tuple[Branch, ...]:
    """The implicit branch, and in training the explicit one."""
    both = (Branch(self.branch, 1.0), Branch("explicit", self._lambda_exp))
    return both if training and self.explicit else both[:1]

  def passes(self, latents: Array, batch: Batch, *, training: bool) -> tuple[tuple[Array, ...], Array]:
    """In training, appends the rows of the explicit branch.

    If the branches have different numbers of tokens, the UNet runs once per branch, and the returned context is padded
    with zeros.
    """
    if not (training and self.explicit):
      return super().passes(latents, batch, training=training)
    contexts = [self.context(batch), self.explicit(batch)]
    tokens = [context.shape[1] for context in contexts]
    padded = jnp.concatenate([jnp.pad(c, ((0, 0), (0, max(tokens) - c.shape[1]), (0, 0))) for c in contexts])
    if tokens[0] == tokens[1]:
      return self.run_unet(jnp.concatenate([latents, latents]), padded)[1], padded
    maps = zip(*(self.run_unet(latents, context)[1] for context in contexts), strict=True)
    return tuple(jnp.concatenate(pair) for pair in maps), padded


# Options that the paper does not specify.
OPTIONS = (
  *("branch_mode", "lambda_exp", "sentence", "clip_resize", "clip_features", "num_queries", "query_init"),
  *("num_blocks", "num_heads", "ffn_ratio", "output_norm", "text_output", "explicit_adapter", "residual_scale"),
  *("tower_dtype", "timestep", "latent_scale"),
)


def _check(options: Fields, unet: UNetSizes, text: TextSizes, *, maps: bool) -> None:
  """Raises a single ValueError with all invalid options."""
  width = unet.context_dim
  problems = [
    f"method.{name}={options[name]!r} is unknown; choose one of {choices}."
    for name, choices in CHOICES.items()
    if options[name] not in choices
  ]
  problems += [
    f"method.{name}={options[name]!r} must be a whole number of at least 1."
    for name in ("num_queries", "num_blocks", "num_heads", "ffn_ratio")
    if not (isinstance(options[name], int) and options[name] >= 1)
  ]
  if options["lambda_exp"] < 0:
    problems.append(f"method.lambda_exp={options['lambda_exp']} must not be negative.")
  if not problems and width % options["num_heads"]:
    problems.append(f"method.num_heads={options['num_heads']} must divide {width}, the width of the UNet's context.")
  if options["branch_mode"] == "both" and text.width != width:
    problems.append(
      f"the text encoder (config.backbone.text) is {text.width} wide, the UNet's context {width}; both branches need "
      "them equal, method.branch_mode='implicit' does not."
    )
  explicit = 1 if options["text_output"] == "pooled" else text.positions
  if options["prompt"] == "sentence+image" and options["branch_mode"] == "both":
    problems.append("method.prompt='sentence+image' has one branch; set method.branch_mode='implicit'.")
  if maps and options["branch_mode"] == "both" and options["num_queries"] != explicit:
    problems.append(
      f"method.attention_maps needs as many tokens in both branches, but method.num_queries={options['num_queries']} "
      f"and a sentence has {explicit}; make them equal."
    )
  if problems:
    raise UserError(" ".join(problems))
