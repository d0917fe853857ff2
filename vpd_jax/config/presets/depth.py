"""Method, neck and head for depth, by method."""

from vpd_jax.config.fields import Section
from vpd_jax.config.presets.backbones import vit


def iedp_assumptions() -> Section:
  """Options of IEDP that the available descriptions of the paper leave open; each is an assumption.

  The options are grouped by the sections of the paper's description: 2 implicit branch,
  3 explicit branch, 4 sharing and losses, 5 decoders and latents, 6 training. Also assumed: CLIP ViT-L/14 at 224
  pixels, `backbone.image` (2); no dropout (2); depth's neck and head, recipe and `optim.norm_group` 0, which is one
  set of batch statistics for both branches (4, 5, 6).
  """
  return {
    "clip_resize": "bicubic",  # 2: the full crop, resized to CLIP's square; "bilinear"
    "clip_features": "last",  # 2: the 257 tokens before any final norm; "penultimate"
    "num_queries": 77,  # 2: the number of tokens of a sentence
    "query_init": 0.02,  # 2: initial standard deviation of the queries
    "num_blocks": 1,  # 2
    "num_heads": 8,  # 2
    "ffn_ratio": 4,  # 2
    "output_norm": "none",  # 2: "ln" brings the context to the scale that the UNet expects
    "sentence": "a photo of a {}",  # 3: {} is the scene; without {} one sentence for all, as "a photo of a street"
    "text_output": "last",  # 3: all states; "pooled"
    "explicit_adapter": "residual",  # 3: as VPD's; "none"
    "residual_scale": 1e-4,  # 3: start of gamma
    "branch_mode": "both",  # 4: "implicit" trains without text
    "lambda_exp": 1.0,  # 4: weight of the explicit branch's loss
    "latent_scale": 1.0,  # 5: as VPD; 0: the scale that Stable Diffusion was trained with
    "timestep": 1,  # 2: as VPD's code
    "tower_dtype": "bfloat16",  # 6: dtype of CLIP's frozen towers; "float32"
  }


def vpd_depth(*, tiny: bool, head_init: str) -> Section:
  """The sections method, neck and head of VPD depth, as released.

  Args:
    tiny: widths of the tiny network, and random class vectors instead of those of the weights.
    head_init: see heads/deconv.py; "released" suits pretrained weights, "fan_in" training from scratch.
  """
  return {
    "method": {
      "name": "vpd",
      "prompt": "scene_class",  # from the folder name, also at test time, as published
      "class_vectors": "random:0" if tiny else "",  # FILE, random:SEED, or "" for those of the weights
      "tokenizer": "",  # a folder, if the weights have no tokenizer
      "residual_scale": 1e-4,
      "timestep": 1,
      "latent_scale": 1.0,
      "pad_multiple": 64,
      "pad_value": 0.0,
    },
    "neck": {"name": "fusion", "width": 192 if tiny else 1536},
    "head": {"name": "deconv", "filters": (32, 32, 32), "width": 24 if tiny else 192, "init": head_init},
  }


def meta_prompts_depth(*, tiny: bool, head_init: str, resize_scale: int = 1) -> Section:
  """The sections method, neck and head of MetaPrompts depth, as released.

  Args:
    tiny: widths of the tiny network.
    head_init: see heads/deconv.py.
    resize_scale: 1 on NYU Depth v2 (480 -> 512), 2 on KITTI (352 -> 448); see methods/meta_prompts.py.
  """
  return {
    "method": {
      "name": "meta_prompts",
      "prompts": 50,
      "refine_steps": 3,  # passes of the UNet; evaluation may use fewer than the weights hold
      "trained_steps": 0,  # steps in the weights; 0: refine_steps
      "refine_init": "released",  # "fan_in" if no weights fill the last block of the UNet
      "share_prompts": False,
      "adapt_prompts": True,
      "time_embedding": "learned",  # "timestep:N"
      "resize_scale": resize_scale,
      "latent_scale": 1.0,
    },
    "neck": {"name": "einsum", "inner": 32},
    "head": {"name": "deconv", "filters": (32, 32, 32), "width": 24 if tiny else 192, "init": head_init},
  }


def iedp_depth(*, tiny: bool, head_init: str) -> Section:
  """The sections method, neck and head of IEDP depth, and its options of init; see `vpd_depth`.

  Args:
    tiny: widths of the tiny network, and random CLIP towers instead of those of `init.clip`.
    head_init: see heads/deconv.py.
  """
  vpd = vpd_depth(tiny=tiny, head_init=head_init)
  return {
    "init": {"clip": "random:0" if tiny else ""},  # folder or file of CLIP, or random:SEED for smoke tests
    "method": {
      "name": "iedp",
      "tokenizer": "characters" if tiny else "",  # a folder, if the weights have none; "characters" for smoke tests
      "pad_multiple": 64,
      "pad_value": 0.0,
      **iedp_assumptions(),
      **({"tower_dtype": "float32"} if tiny else {}),
    },
    "neck": vpd["neck"],
    "head": vpd["head"],
  }


def tadp_depth(*, tiny: bool, head_init: str) -> Section:
  """The sections method, neck and head of TADP depth, as released, and its options of init; see `vpd_depth`.

  Args:
    tiny: widths of the tiny network, with a random text encoder and a placeholder tokenizer.
    head_init: see heads/deconv.py.
  """
  vpd = vpd_depth(tiny=tiny, head_init=head_init)
  return {
    "init": {"clip": "random:0" if tiny else ""},  # CLIP's text encoder: a folder, if the weights have none
    "method": {
      "name": "tadp",
      "token_length": 77,
      "tokenizer": "characters" if tiny else "",  # a folder, if the weights have none; "words" for smoke tests
      "latents": "sample",  # "mode"
      "latent_scale": 0.0,  # that of the backbone
      **{name: vpd["method"][name] for name in ("timestep", "pad_multiple", "pad_value")},
    },
    "neck": vpd["neck"],
    "head": vpd["head"],
  }


def eco_depth(*, tiny: bool, head_init: str) -> Section:
  """The sections method, neck and head of EcoDepth, as released, and its options of backbone and init.

  Args:
    tiny: widths of the tiny network, and a random classifier instead of that of `init.vit`.
    head_init: see heads/deconv.py.
  """
  vpd = vpd_depth(tiny=tiny, head_init=head_init)
  return {
    "backbone": {"vit": vit(tiny=tiny)},
    "init": {"vit": "random:0" if tiny else ""},  # folder or file of the classifier, or random:SEED for smoke tests
    "method": {
      "name": "eco_depth",
      "prompt": "image",  # "class_token" of a transformer that is trained
      "embeddings": 100,  # 200 in the released outdoor weights
      "vit_bytes": "truncated",  # "rounded"
      "vit_padding": True,
      "class_scores": "logits",  # "probabilities"
      "residual_scale": 1e-4,
      "timestep": 1,
      "latent_scale": 0.0,  # that of the backbone
      "pad_multiple": 64,
      "pad_value": -1.0,  # black; 0.0 from v2.0.0 on
    },
    "neck": vpd["neck"] | {"cut_padding": False},
    "head": vpd["head"] | {"cut_padding": "prediction"},  # "features" from v2.0.0 on
  }


def eco_depth_recipe(*, iterations: int, test_time: tuple[str, ...]) -> Section:
  """Where the recipe of EcoDepth's release differs from VPD's; its global batch is 32, on 8 GPUs x 4.

  Args:
    iterations: steps per epoch, of 25 epochs.
    test_time: see `recipe.evaluation`.

  Source: EcoDepth depth/train.py, depth/test.py, depth/models/optimizer.py, depth/utils_depth (v1.0.0).
  """
  return {
    **dict.fromkeys(("eval_every", "save_every"), iterations),
    "num_steps": 25 * iterations,
    "task": {"variance_focus": 0.85, "loss_scale": 10.0, "clip_prediction": True, "benchmark_silog": True},
    "data": {"batch_size": 32},
    "optim": {
      "schedule": {"half": 12 * iterations},
      "lr_groups": ((r"/vae/", None), (r"/unet/", 0.01), (r"/embeddings$", 10.0), (r"", 1.0)),
      "norm_group": 4,
      "loss_group": 4,
    },
    "eval": {"test_time": test_time},
  }
