"""VPD: the text-prompted UNet of Stable Diffusion as a perception backbone.

Figure 2 of the paper: the image is encoded by the frozen VAE (mode of the posterior, no noise); the class or scene
names, encoded by the frozen CLIP text encoder into `class_vectors`, pass the text adapter; the UNet runs once at a
constant timestep with the adapted text as its context; its four feature maps are passed to the task's neck and head.
Depth uses one token, the vector of the scene's class; neck "fusion", head "deconv". The class is given, as in the
release also at test time, or predicted from the image by CLIP. Segmentation uses the vectors of all classes, whose
cross-attention maps are concatenated to the features; neck and head "fpn". Referring segmentation uses the states of
all tokens of a sentence, and their maps; no neck, head "lavt".

Source: Zhao et al. 2023, https://arxiv.org/abs/2303.02153; VPD depth/models_depth/model.py, vpd/models.py.
"""

from vpd_jax.errors import UserError, check_choice
from vpd_jax.models.backbones.clip_text import as_buffers
from vpd_jax.models.context.adapters import ResidualAdapter
from vpd_jax.models.context.class_vectors import AllClasses, PredictedClass, SceneClass
from vpd_jax.models.context.context import Context
from vpd_jax.models.context.sentences import Sentence
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.diffusion import ConstantTime, DiffusionMethod, MethodSetup

PROMPTS = ("scene_class", "predicted", "all_classes", "sentence")


class Vpd(DiffusionMethod):
  """Image and class of the scene to the four maps of the UNet."""

  text_options = ("class_vectors", "tokenizer", "templates")

  def __init__(
    self,
    setup: MethodSetup,
    *,
    prompt: str = "scene_class",
    token_length: int = 40,
    residual_scale: float = 1e-4,
    timestep: int = 1,
    latent_scale: float = 1.0,
    pad_multiple: int = 64,
    pad_value: float = 0.0,
    attention_maps: bool = False,
    attention_max_size: int = 32,
    attention_gradient: bool = False,
    keep_unused: bool = False,
  ):
    """Builds the parts.

    Args:
      setup: see MethodSetup; "sentence" needs no classes, the other prompts no tokenizer.
      prompt: tokens that the UNet attends to. "scene_class": the vector of the class `batch["class_id"]` (-1: the mean
        of all). "predicted": the vector of the class that CLIP predicts from the image, or from each window with
        windows; a "class_id" of 0 or more in the batch has precedence. "all_classes": the vectors of all classes.
        "sentence": the states of each image's sentence.
      token_length: tokens of a sentence. Release: 40 on RefCOCO and RefCOCO+, 77 on RefCOCOg.
      residual_scale: initial gamma in text + gamma * adapter(text). Release: 1e-4.
      timestep: the diffusion timestep of all images. Release: 1 (the paper says 0).
      latent_scale: see DiffusionMethod. Release: 1.0.
      pad_multiple: the image is padded at right and bottom to the next multiple. Release: 64, e.g. 480 -> 512.
      pad_value: of the padding, after scaling to [-1, 1]. Release: 0, mid gray.
      attention_maps: concatenate the cross-attention maps to the features. Release: in segmentation and referring.
      attention_max_size, attention_gradient: size of the maps, and whether to backpropagate through them; see
        image_input.joined_maps. Release: 32, False (they are stored without gradient).
      keep_unused: include the UNet's last block, which is unused, as in the released segmentation checkpoints.

    Raises:
      ValueError: unknown prompt; no classes; a padding that the UNet does not support.
    """
    context = _context(setup, prompt, token_length, residual_scale)
    super().__init__(
      setup,
      fit=image_input.PaddedInput(pad_multiple, pad_value),
      context=context,
      time=ConstantTime(timestep),
      latent_scale=latent_scale,
      join=image_input.joined_maps(
        setup.unet, context.tokens[0], use=attention_maps, max_size=attention_max_size, gradient=attention_gradient
      ),
      with_out=keep_unused,
    )
    if keep_unused:
      self.unet.out = as_buffers(self.unet.out)


def _context(setup: MethodSetup, prompt: str, token_length: int, residual_scale: float) -> Context:
  """The source of the tokens."""
  check_choice("method.prompt", prompt, PROMPTS, owner="vpd")
  classes, width, layer = len(setup.class_names), setup.unet.context_dim, setup.common.layer
  if classes < 1 and prompt != "sentence":
    raise UserError(
      f"method.prompt={prompt!r} chooses among the classes of the data set, which names none; set config.data.scene "
      "to one name for all images, or use a method that needs no class."
    )
  adapt = ResidualAdapter(width, residual_scale, **layer)
  if prompt == "sentence":
    return Sentence(setup.text, token_length, width, setup.tokenize, adapt, **layer)
  if prompt == "predicted":
    return PredictedClass(classes, width, adapt, image=setup.image, **layer)
  return {"scene_class": SceneClass, "all_classes": AllClasses}[prompt](classes, width, adapt, **layer)
