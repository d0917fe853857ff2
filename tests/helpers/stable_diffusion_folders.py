"""Folders of diffusers that hold configs."""

import json

SD1 = {
  "unet": {
    "in_channels": 4, "out_channels": 4, "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768, "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
  },
  "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "act_fn": "silu"},
  "text_encoder": {
    "vocab_size": 49408, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
  },
}  # fmt: skip


def folder(tmp_path, configs):
  for part, config in configs.items():
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / part / "config.json").write_text(json.dumps(config))
  return tmp_path
