"""EcoDepth: VPD with a context computed from the image by an ImageNet classifier instead of the scene class.

The frozen VAE encodes the padded image to the mode of its posterior, scaled as for Stable Diffusion; a frozen vision
transformer predicts ImageNet classes, whose scores weight learned vectors to form one token; the UNet runs once at a
constant timestep. Neck and head are those of VPD: "fusion", here without cropping the padding, and "deconv". The other
tasks combine this context with VPD's necks and heads, and referring segmentation adds a sentence before the token;
these combinations are not part of the publication.

Source: Patni et al. 2024, https://arxiv.org/abs/2403.18807; EcoDepth depth/models/model.py (v1.0.0), model.py (v2.0.0).
"""

import dataclasses

from vpd_jax.errors import UserError, check_choice
from vpd_jax.models.backbones import layers
from vpd_jax.models.context.adapters import ResidualAdapter
from vpd_jax.models.context.class_mixture import ClassMixture, ClassToken
from vpd_jax.models.context.context import Context, SentenceThen
from vpd_jax.models.context.sentences import Sentence
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.diffusion import ConstantTime, DiffusionMethod, MethodSetup

PROMPTS = ("image", "class_token", "sentence+image")


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The options of the mixture of learned vectors, see `EcoDepth`, with their defaults."""

  embeddings: int = 100
  class_scores: str = "logits"
  residual_scale: float = 1e-4

  def changed(self) -> list[str]:
    """The options that differ from their defaults, as overrides of a config."""
    return [f"method.{name}={value!r}" for name, value in vars(self).items() if value != getattr(Mixture, name)]


class EcoDepth(DiffusionMethod):
  """Image to the four maps of the UNet, without text or class."""

  def __init__(
    self,
    setup: MethodSetup,
    *,
    prompt: str = "image",
    token_length: int = 40,
    embeddings: int = Mixture.embeddings,
    vit_bytes: str = "truncated",
    vit_padding: bool = True,
    class_scores: str = Mixture.class_scores,
    residual_scale: float = Mixture.residual_scale,
    timestep: int = 1,
    latent_scale: float = 0.0,
    pad_multiple: int = 64,
    pad_value: float = -1.0,
  ):
    """Builds the parts.

    Args:
      setup: see MethodSetup.
      prompt: "image", the context above; "class_token", the class token of the transformer, which is then trained,
        instead of the mixture, as in a later version of the release; "sentence+image", the states of each image's
        sentence followed by the mixture, for referring segmentation (not published).
      token_length: tokens of such a sentence.
      embeddings: number of learned vectors. Release: 100 on NYU Depth v2 and KITTI, 200 for its outdoor weights.
      vit_bytes: rounding of the classifier's input, "truncated" or "rounded", see class_mixture.to_bytes. Release:
        "truncated", which decreases the bytes from 1 to 63 by one.
      vit_padding: whether the classifier sees the padding too. Release: True.
      class_scores: of the classifier, "logits" or "probabilities". Release: "logits".
      residual_scale: initial gamma in x + gamma * adapter(x). Release: 1e-4.
      timestep: the diffusion timestep of all images. Release: 1.
      latent_scale: see DiffusionMethod. Release: 0, which is 0.18215.
      pad_multiple: the image is padded at right and bottom to the next multiple. Release: 64.
      pad_value: of the padding, after scaling to [-1, 1]. Release: -1, black; from v2.0.0 on 0, gray.

    Raises:
      ValueError: an unknown option, a padding that the UNet does not support, a transformer whose width does not match
        the UNet, or an option of the mixture without a mixture.
    """
    check_choice("method.prompt", prompt, PROMPTS, owner="eco_depth")
    width, layer = setup.unet.context_dim, setup.common.layer
    input_options = {"vit_bytes": vit_bytes, "padding": (pad_multiple, pad_value) if vit_padding else None}
    context: Context
    if prompt == "class_token":
      if unused := Mixture(embeddings, class_scores, residual_scale).changed():
        raise UserError(
          f"method.prompt='class_token' has no mixture to read {', '.join(unused)}; leave these as they are."
        )
      context = ClassToken(setup.vit, width, **input_options, **layer)
    else:
      adapt = ResidualAdapter(width, residual_scale, **layer)
      context = ClassMixture(setup.vit, width, embeddings, adapt, class_scores=class_scores, **input_options, **layer)
    if prompt == "sentence+image":
      sentence = Sentence(setup.text, token_length, width, setup.tokenize, layers.Identity(), **layer)
      context = SentenceThen(sentence, context)
    super().__init__(
      setup,
      fit=image_input.PaddedInput(pad_multiple, pad_value),
      context=context,
      time=ConstantTime(timestep),
      latent_scale=latent_scale,
    )
