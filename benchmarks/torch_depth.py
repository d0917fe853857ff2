"""The other side of scripts/benchmark.py: VPD depth on diffusers' PyTorch UNet and VAE, as a user would build it today.

python benchmarks/torch_depth.py --settings=FILE --output=FILE      (scripts/benchmark.py --versus=torch calls it)
python benchmarks/torch_depth.py --settings=FILE --predict          (benchmarks/first_picture.py calls it)

The second form goes from the authors' file to colored pictures, see `predict`.

The first one trains, the same work as ours: frozen VAE encoder without gradient, text adapter, UNet, fusion, the depth
head, SiLog in groups of images, gradients of everything else, AdamW with one rate for the UNet and one for the rest. On
a GPU: bfloat16 autocast around float32 weights, channels_last, scaled-dot-product attention, fused AdamW, torch.compile
where it works.
Batch normalization takes the whole batch, as plain PyTorch does. Needs torch and diffusers (extra `reference`).
"""

import argparse
import contextlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import diffusers
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Settings = dict[str, Any]  # those of scripts/benchmark.py: the config, batch, steps, warm-up, compile


def make_unet(sizes: Settings) -> diffusers.UNet2DConditionModel:
  """Stable Diffusion's UNet of these sizes without its last layers, which depth does not use."""
  widths = [sizes["model_channels"] * m for m in sizes["channel_mult"]]
  levels = range(len(widths))
  down = ["CrossAttnDownBlock2D" if level in sizes["attention_levels"] else "DownBlock2D" for level in levels]
  up = ["CrossAttnUpBlock2D" if level in sizes["attention_levels"] else "UpBlock2D" for level in reversed(levels)]
  unet = diffusers.UNet2DConditionModel(
    in_channels=sizes["in_channels"],
    out_channels=sizes["out_channels"],
    down_block_types=tuple(down),
    up_block_types=tuple(up),
    block_out_channels=tuple(widths),
    layers_per_block=sizes["num_res_blocks"],
    # diffusers' name for the number of heads in SD 1.x.
    attention_head_dim=sizes["num_heads"] or [width // sizes["head_width"] for width in widths],
    cross_attention_dim=sizes["context_dim"],
    use_linear_projection=sizes["linear_projection"],
  )
  del unet.conv_norm_out, unet.conv_out
  return unet


def make_vae(sizes: Settings) -> diffusers.AutoencoderKL:
  """The autoencoder of these sizes, frozen, without its decoder."""
  levels = len(sizes["channel_mult"])
  vae = diffusers.AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * levels,
    up_block_types=("UpDecoderBlock2D",) * levels,
    block_out_channels=tuple(sizes["channels"] * m for m in sizes["channel_mult"]),
    layers_per_block=sizes["num_res_blocks"],
    latent_channels=sizes["z_channels"],
  )
  del vae.decoder
  return vae.eval().requires_grad_(False)


class Encoder(nn.Module):
  """Image and class to one map at stride 32. Source: VPD depth/models_depth/model.py VPDDepthEncoder."""

  def __init__(self, config: Settings, classes: int):
    super().__init__()
    unet, method, width = config["backbone"]["unet"], config["method"], config["neck"]["width"]
    self.timestep = method["timestep"]
    self.latent_scale = method["latent_scale"] or config["backbone"]["vae"]["latent_scale"]
    self.multiple, self.pad_value = method["pad_multiple"], method["pad_value"]
    widths, tokens = [unet["model_channels"] * m for m in unet["channel_mult"]], unet["context_dim"]
    self.vae, self.unet = make_vae(config["backbone"]["vae"]), make_unet(unet)
    self.register_buffer("class_embeddings", torch.randn(classes, tokens))
    self.gamma = nn.Parameter(torch.full((tokens,), method["residual_scale"]))
    self.text_adapter = nn.Module()
    self.text_adapter.fc = nn.Sequential(nn.Linear(tokens, tokens), nn.GELU(), nn.Linear(tokens, tokens))
    half = lambda w: nn.Conv2d(w, w, 3, stride=2, padding=1)
    self.layer1 = nn.Sequential(half(widths[0]), nn.GroupNorm(16, widths[0]), nn.ReLU(), half(widths[0]))
    self.layer2 = nn.Sequential(half(widths[1]))
    self.out_layer = nn.Sequential(nn.Conv2d(sum(widths), width, 1), nn.GroupNorm(16, width), nn.ReLU())

  def forward(self, image: torch.Tensor, class_id: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] and int [B] to [B, C, h, w], cut to the part that shows the image."""
    x = image.float() / 127.5 - 1
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), value=self.pad_value)
    with torch.no_grad():
      latents = self.vae.encode(x).latent_dist.mode() * self.latent_scale
    text = self.class_embeddings[class_id][:, None]  # [B, 1, D]
    finest, fine, coarse, coarsest = self.maps(latents, text + self.gamma * self.text_adapter.fc(text))
    coarsest = F.interpolate(coarsest, size=coarse.shape[2:])
    x = self.out_layer(torch.cat([self.layer1(finest), self.layer2(fine), coarse, coarsest], dim=1))
    return x[:, :, : -(-height // 32), : -(-width // 32)]

  def maps(self, latents: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
    """The UNet's four features, finest first. Source: VPD vpd/models.py register_hier_output, taps 1, 4, 7 and 11."""
    unet = self.unet
    time_embedding = unet.time_embedding(unet.time_proj(torch.full((1,), self.timestep, device=latents.device)))
    time_embedding = time_embedding.expand(len(latents), -1)
    h, features = unet.conv_in(latents), []
    skips = [h]
    for block in unet.down_blocks:
      attends = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
      h, found = block(h, time_embedding, **attends)
      skips += found
    h = unet.mid_block(h, time_embedding, encoder_hidden_states=context)
    for level, block in enumerate(unet.up_blocks):
      tap = len(block.resnets) - (1 if level == len(unet.up_blocks) - 1 else 2)
      for i, resnet in enumerate(block.resnets):
        h = resnet(torch.cat([h, skips.pop()], dim=1), time_embedding)
        if hasattr(block, "attentions"):
          h = block.attentions[i](h, encoder_hidden_states=context, return_dict=False)[0]
        if i == tap:
          features.append(h)
      for upsampler in block.upsamplers or ():
        h = upsampler(h)
    return features[::-1]


class Decoder(nn.Module):
  """Transposed convolutions to stride 4, then up to the image. Source: VPD model.py Decoder, VPDDepth."""

  def __init__(self, config: Settings, width: int):
    super().__init__()
    last, deconvs = width, []
    for filters in config["head"]["filters"]:
      deconvs += [nn.ConvTranspose2d(last, filters, 2, stride=2, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
      last = filters
    width, doublings = config["head"]["width"], 5 - len(config["head"]["filters"])
    self.max_depth, self.doublings = config["task"]["max_depth"], doublings
    self.deconv_layers = nn.Sequential(*deconvs)
    self.conv_layers = nn.Sequential(nn.Conv2d(last, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.conv_layers(self.deconv_layers(x))
    for _ in range(self.doublings):
      x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return x


class VpdDepth(nn.Module):
  """Image and class to metric depth; names are the authors', so that their table of conversion holds."""

  def __init__(self, config: Settings, classes: int = 27):
    super().__init__()
    width = config["head"]["width"]
    self.encoder, self.decoder = Encoder(config, classes), Decoder(config, config["neck"]["width"])
    self.last_layer_depth = nn.Sequential(
      nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1)
    )

  def forward(self, image: torch.Tensor, class_id: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] and int [B] to float32 [B, H, W], meters."""
    x = self.last_layer_depth(self.decoder(self.encoder(image, class_id)))
    if x.shape[2:] != image.shape[2:]:
      x = F.interpolate(x, size=image.shape[2:], mode="bilinear", align_corners=False)
    return torch.sigmoid(x.float())[:, 0] * self.decoder.max_depth


def silog(prediction: torch.Tensor, truth: torch.Tensor, group: int, focus: float = 0.5) -> torch.Tensor:
  """Mean over groups of images of sqrt(mean(e^2) - focus * mean(e)^2) at pixels with ground truth, e = log ratio.

  Source: VPD depth/utils_depth/criterion.py.
  """
  prediction, truth = (x.reshape(len(x) // group, -1) for x in (prediction, truth))
  valid = truth > 0
  error = torch.where(valid, truth.clamp(min=1e-6).log() - prediction.log(), 0)
  count = valid.sum(1).clamp(min=1)
  return ((error**2).sum(1) / count - focus * (error.sum(1) / count) ** 2).sqrt().mean()


def make_optimizer(model: VpdDepth, config: Settings, device: torch.device) -> torch.optim.Optimizer:
  """AdamW: a hundredth of the rate for the UNet, no decay for vectors. Source: VPD depth/models_depth/optimizer.py."""
  optim, groups = config["optim"], {}
  for name, parameter in model.named_parameters():
    if parameter.requires_grad:
      groups.setdefault((".unet." in name, parameter.ndim < 2), []).append(parameter)
  options = [
    {"params": group, "lr": optim["lr"] * (0.01 if unet else 1), "weight_decay": 0.0 if vector else optim["decay"]}
    for (unet, vector), group in groups.items()
  ]
  betas = (optim["b1"], optim["b2"])
  return torch.optim.AdamW(options, betas=betas, eps=optim["epsilon"], fused=device.type == "cuda")


def synthetic_batch(batch: int, crop: tuple[int, int], device: torch.device) -> dict[str, torch.Tensor]:
  """A batch of noise."""
  torch.manual_seed(0)
  return {
    "image": torch.randint(0, 256, (batch, 3, *crop), dtype=torch.uint8).to(device),
    "depth": torch.rand(batch, *crop).mul_(9).add_(0.5).to(device),
    "class_id": torch.randint(0, 27, (batch,)).to(device),
  }


@contextlib.contextmanager
def computing(dtype: str, device: torch.device) -> Iterator[None]:
  """bfloat16 where the config says so."""
  with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
    yield


def timed(work: Callable[[], Any], steps: int, warm_up: int, device: torch.device) -> tuple[list[float], float]:
  """Milliseconds of each call after the warm-up, and seconds of the first call, compilation included."""
  wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
  times = []
  for _ in range(warm_up + steps):
    begin = time.perf_counter()
    work()
    wait()
    times.append(1e3 * (time.perf_counter() - begin))
  return times[warm_up:], times[0] / 1e3


def measure(settings: Settings) -> dict[str, Any]:
  """Times of training steps and of the forward pass alone; see scripts/benchmark.py for the fields."""
  config, device = settings["config"], torch.device("cuda" if torch.cuda.is_available() else "cpu")
  if config["method"]["name"] != "vpd" or config["task"]["name"] != "depth":
    raise ValueError("the PyTorch side is written for VPD depth only; give configs/nyu_depth.py:vpd or the like.")
  torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  model = VpdDepth(config).to(device, memory_format=torch.channels_last).train()
  model.encoder.vae.eval()
  optimizer = make_optimizer(model, config, device)
  batch = synthetic_batch(settings["batch"], tuple(config["data"]["crop"]), device)
  batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
  compiled = settings["compile"] == "on" or (settings["compile"] == "auto" and device.type == "cuda")
  call = torch.compile(model) if compiled else model
  group = config["optim"]["loss_group"] or settings["batch"]
  losses = []

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    with computing(config["dtype"], device):
      depth = call(batch["image"], batch["class_id"])
    loss = silog(depth, batch["depth"], group)
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())

  def forward() -> None:
    with torch.no_grad(), computing(config["dtype"], device):
      call(batch["image"], batch["class_id"])

  result = {"side": f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}, compile {compiled}"}
  result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
  if settings["forward"]:
    model.eval()
    times, _ = timed(forward, settings["steps"], settings["warm_up"], device)
    result["forward_ms"] = statistics.median(times)
    model.train()
    model.encoder.vae.eval()
  times, first = timed(step, settings["steps"], settings["warm_up"], device)
  peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
  return result | {
    "step_times_ms": times,
    "first_step_s": first,
    "losses": [float(loss) for loss in losses],
    "peak_bytes": peak,
    "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
  }


def load(settings: Settings) -> VpdDepth:
  """The network with the weights of the authors' file, which stay in the file until they are read."""
  with torch.device("meta"):
    model = VpdDepth(settings["config"])
  stored = torch.load(settings["weights"], mmap=True, weights_only=True)["model"]
  shapes = {name: x.shape for name, x in model.state_dict().items()}
  state = {name: stored[of_file].reshape(shapes[name]) for name, of_file in settings["names"].items()}
  model.load_state_dict(state, assign=True)
  return model.eval()


def views(image: np.ndarray, side: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
  """uint8 [H, W, 3], resized so that its shorter side is `side`, and the corners (y, x) of windows that cover it."""
  scale = side / min(image.shape[:2])
  height, width = (max(side, round(s * scale)) for s in image.shape[:2])
  image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
  longer, count = max(height, width), max(2, -(-max(height, width) // side))
  starts = [0] if height == width else [round(i * (longer - side) / (count - 1)) for i in range(count)]
  return image, [(start, 0) if height > width else (0, start) for start in starts]


def predict(settings: Settings) -> None:
  """Writes the colored depth of pictures: all windows of one and their mirror images are one batch.

  Args:
    settings: the config; `weights`, the file; `names`, our names to those of the file; `class_id`; `pictures`, paths
      to read and to write; `side` of a window.
  """
  model, side = load(settings), settings["side"]
  for source, target in settings["pictures"]:
    image = cv2.imread(source)[..., ::-1]
    resized, corners = views(image, side)
    cut = np.stack([resized[y : y + side, x : x + side] for y, x in corners]).transpose(0, 3, 1, 2)
    batch = torch.from_numpy(np.concatenate([cut, cut[..., ::-1]]))
    with torch.inference_mode():
      found = model(batch, torch.full((len(batch),), settings["class_id"])).numpy()
    straight, mirrored = found[: len(corners)], found[len(corners) :, :, ::-1]
    depth, seen = np.zeros(resized.shape[:2], np.float32), np.zeros(resized.shape[:2], np.float32)
    for (y, x), one in zip(corners, (straight + mirrored) / 2, strict=True):
      depth[y : y + side, x : x + side] += one
      seen[y : y + side, x : x + side] += 1
    depth = cv2.resize(depth / seen, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    share = (depth - depth.min()) / max(float(depth.max() - depth.min()), 1e-6)
    cv2.imwrite(target, (matplotlib.colormaps["Spectral"](share)[..., 2::-1] * 255).astype(np.uint8))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--settings", type=Path, required=True, help="JSON, written by scripts/benchmark.py")
  where = parser.add_mutually_exclusive_group(required=True)
  where.add_argument("--output", type=Path, help="JSON to write")
  where.add_argument("--predict", action="store_true", help="colored pictures, where the settings say")
  options = parser.parse_args()
  diffusers.utils.logging.set_verbosity_error()
  settings = json.loads(options.settings.read_text())
  if options.predict:
    predict(settings)
  else:
    options.output.write_text(json.dumps(measure(settings)))


if __name__ == "__main__":
  main()
