"""The authors' checkpoints of referring segmentation: VPD on RefCOCO, RefCOCO+ (40 tokens) and RefCOCOg (77).

They do not contain the text encoder: CLIP's is frozen and loaded separately, see released.CLIP.

Source: VPD refer/models_refer/model.py, class VPDRefer; refer/train.py (entry "model").
"""

from vpd_jax.convert.rules import BATCH_NORM, DROP_COUNTERS, LAYER, Drop, Rule, plain
from vpd_jax.convert.tables import stable_diffusion

SIGN = "classifier.conv1_4."  # a prefix that no other release has
# The registration order of the decoder's layers.
ORDER = (
  "classifier "
  + " ".join(f"{layer}_{level}" for level in (4, 3, 2) for layer in ("conv1", "bn1", "conv2", "bn2"))
  + " conv1_1"
)


def vpd_refer() -> list[Rule | Drop]:
  """VPD's referring segmentation. The UNet's last block is in the files, but unused."""
  return [
    Rule("gamma", "method/gamma", (plain,)),
    *stable_diffusion.first_stage("encoder_vq"),
    *stable_diffusion.unet("unet.unet.diffusion_model", out=True),
    Rule("text_adapter", "method/text_adapter"),
    Rule("classifier", "head", (*LAYER, *BATCH_NORM)),
    DROP_COUNTERS,
  ]
