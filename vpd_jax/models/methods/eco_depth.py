"""EcoDepth: VPD whose context is read off the picture by a classifier of ImageNet, in place of the scene's class.

Left to right: the padded image is encoded by the frozen VAE, its mode scaled as Stable Diffusion was trained; a frozen
vision transformer tells the classes of ImageNet in the image, whose scores mix learned vectors to one token; the UNet
runs once at a constant timestep. Neck and head are VPD's: "fusion", which keeps the padding here, and "deconv". Other
tasks take its context with VPD's necks and heads, which is an experiment of ours, as is a sentence before the token in
referring segmentation.

Source: Patni et al. 2024, https://arxiv.org/abs/2403.18807; EcoDepth depth/models/model.py (v1.0.0), model.py (v2.0.0).
"""

from vpd_jax.errors import UserError
from vpd_jax.models.backbones import layers
from vpd_jax.models.context.adapters import ResidualAdapter
from vpd_jax.models.context.class_mixture import ClassMixture, ClassToken
from vpd_jax.models.context.context import Context, SentenceThen
from vpd_jax.models.context.sentences import Sentence
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.diffusion import ConstantTime, DiffusionMethod, MethodSetup

PROMPTS = ("image", "class_token", "sentence+image")
MIXTURE = {
  "embeddings": 100,
  "class_scores": "logits",
  "residual_scale": 1e-4,
}  # defaults of what "class_token" does not use


class EcoDepth(DiffusionMethod):
  """Image to the four maps of the UNet, without text or class."""

  def __init__(
    self,
    setup: MethodSetup,
    *,
    prompt: str = "image",
    token_length: int = 40,
    embeddings: int = 100,
    vit_bytes: str = "truncated",
    vit_padding: bool = True,
    class_scores: str = "logits",
    residual_scale: float = 1e-4,
    timestep: int = 1,
    latent_scale: float = 0.0,
    pad_multiple: int = 64,
    pad_value: float = -1.0,
  ):
    """Builds the parts.

    Args:
      setup: see MethodSetup.
      prompt: "image", the context above; "class_token", the class token of the transformer, which is then trained, in
        place of the mixture, as in a later version of the release; "sentence+image", the mixture behind the states of
        each image's sentence, which is ours, for referring segmentation.
      token_length: tokens of such a sentence.
      embeddings: learned vectors. Release: 100 on NYU Depth v2 and KITTI, 200 for its weights of outdoor pictures.
      vit_bytes: bytes of the classifier's picture, "truncated" or "rounded", see class_mixture.to_bytes. Release:
        "truncated", by which the bytes from 1 to 63 lose one.
      vit_padding: whether the classifier sees the padding too. Release: True.
      class_scores: of the classifier, "logits" or "probabilities". Release: "logits".
      residual_scale: start of gamma in x + gamma * adapter(x). Release: 1e-4.
      timestep: the diffusion timestep, the same for every image. Release: 1.
      latent_scale: factor on the latents; 0 for that with which the backbone was trained. Release: 0, which is 0.18215.
      pad_multiple: the image grows at right and bottom to the next multiple. Release: 64.
      pad_value: of the padding, after scaling to [-1, 1]. Release: -1, black; from v2.0.0 on 0, gray.

    Raises:
      ValueError: an unknown word, a padding the UNet cannot take, a transformer whose class token the UNet cannot take,
        an option of the mixture where there is none.
    """
    if prompt not in PROMPTS:
      raise UserError(f"method.prompt={prompt!r} is unknown to eco_depth; choose one of {PROMPTS}.")
    width, layer = setup.unet.context_dim, setup.common.layer
    seen = {"vit_bytes": vit_bytes, "padding": (pad_multiple, pad_value) if vit_padding else None}
    mixing = {"embeddings": embeddings, "class_scores": class_scores, "residual_scale": residual_scale}
    context: Context
    if prompt == "class_token":
      if others := [f"method.{name}={mixing[name]!r}" for name in MIXTURE if mixing[name] != MIXTURE[name]]:
        raise UserError(
          f"method.prompt='class_token' has no mixture to read {', '.join(others)}; leave these as they are."
        )
      context = ClassToken(setup.vit, width, **seen, **layer)
    else:
      adapt = ResidualAdapter(width, residual_scale, **layer)
      context = ClassMixture(setup.vit, width, embeddings, adapt, class_scores=class_scores, **seen, **layer)
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
