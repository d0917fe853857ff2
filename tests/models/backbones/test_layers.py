"""Layers against numpy restatements and, where torch is installed, against torch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import fill
from vpd_jax.models.backbones import layers, normalization

KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}
NORMAL = nnx.initializers.normal(1.0)


def kinds():
  return {**KINDS, "rngs": nnx.Rngs(0)}


def image(*shape, scale=1.0, offset=0.0):
  return fill.normal("image", shape, 0, scale, offset)


def batch_norm(width=3, **options):
  """A layer whose parameters and statistics are all different from their fresh values."""
  norm = normalization.BatchNorm(width, **options, **kinds())
  norm.scale[...] = jnp.linspace(0.5, 1.5, width)
  norm.bias[...] = jnp.linspace(-1, 1, width)
  norm.mean[...] = jnp.linspace(-2, 2, width)
  norm.var[...] = jnp.linspace(0.3, 3, width)
  return norm


def normalized(x, mean, var, norm):
  """The formula in float64."""
  scale, bias = (np.asarray(p[...], np.float64) for p in (norm.scale, norm.bias))
  return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def test_batch_norm_in_evaluation_uses_the_running_statistics():
  norm, x = batch_norm(), image(4, 5, 6, 3)
  before = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
  np.testing.assert_allclose(norm(jnp.asarray(x), training=False), normalized(x, *before, norm), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(norm.mean[...], before[0])
  np.testing.assert_array_equal(norm.var[...], before[1])


@pytest.mark.parametrize("group", [1, 2, 3, 6, 0])
def test_batch_norm_in_training_normalizes_every_group_by_itself(group):
  norm, x = batch_norm(group=group), image(6, 5, 4, 3, scale=2.0, offset=3.0)
  actual = norm(jnp.asarray(x), training=True)
  x = x.astype(np.float64)
  for start in range(0, 6, group or 6):
    part = x[start : start + (group or 6)]
    expected = normalized(part, part.mean((0, 1, 2)), part.var((0, 1, 2)), norm)
    np.testing.assert_allclose(actual[start : start + (group or 6)], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("group", [1, 2, 3, 6, 0])
def test_running_statistics_move_to_the_mean_over_groups_of_mean_and_unbiased_variance(group):
  norm, x = batch_norm(group=group, momentum=0.2), image(6, 5, 4, 3, scale=2.0, offset=3.0)
  mean, var = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
  norm(jnp.asarray(x), training=True)
  parts = x.astype(np.float64).reshape(-1, group or 6, 5, 4, 3)
  new_mean = np.mean([p.mean((0, 1, 2)) for p in parts], axis=0)
  new_var = np.mean([p.var((0, 1, 2), ddof=1) for p in parts], axis=0)
  np.testing.assert_allclose(norm.mean[...], 0.8 * mean + 0.2 * new_mean, rtol=1e-6)
  np.testing.assert_allclose(norm.var[...], 0.8 * var + 0.2 * new_var, rtol=1e-6)


def test_batch_norm_of_a_single_value_stays_finite():
  norm = batch_norm()
  assert np.isfinite(norm(jnp.asarray(image(1, 1, 1, 3)), training=True)).all()
  assert np.isfinite(norm.var[...]).all()


def test_batch_norm_keeps_float32_statistics_of_bfloat16_images():
  norm = normalization.BatchNorm(3, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jnp.asarray(image(4, 8, 8, 3, offset=100.0), jnp.bfloat16)
  assert norm(x, training=True).dtype == jnp.bfloat16
  assert norm.mean[...].dtype == norm.var[...].dtype == jnp.float32
  expected = np.asarray(x, np.float64).mean((0, 1, 2))
  np.testing.assert_allclose(norm.mean[...], 0.1 * expected, rtol=1e-6)


def test_batch_norm_refuses_a_batch_that_is_no_multiple_of_the_group():
  with pytest.raises(ValueError, match="4 images cannot be split into groups of 3 for batch normalization"):
    batch_norm(group=3)(jnp.zeros((4, 2, 2, 3)), training=True)


def test_chain_tells_batch_norm_alone_whether_this_is_training():
  norm, x = batch_norm(), jnp.asarray(image(4, 5, 6, 3))
  chain = nnx.List([layers.Identity(), norm, layers.ReLU()])
  evaluated = layers.chain(chain, x)
  np.testing.assert_array_equal(evaluated, jax.nn.relu(norm(x, training=False)))
  assert np.abs(layers.chain(chain, x, training=True) - evaluated).max() > 0.1


def test_nearest_picks_the_rows_that_torch_picks():
  x = jnp.asarray(np.arange(5, dtype=np.float32).reshape(1, 5, 1, 1))
  assert layers.resize(x, (9, 1), method="nearest").ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
  assert layers.resize(x, (10, 1), method="nearest").ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
  assert layers.resize(x, (3, 1), method="nearest").ravel().tolist() == [0, 1, 3]
  columns = layers.resize(x.reshape(1, 1, 5, 1), (2, 9), method="nearest")[0, :, :, 0]
  assert columns.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4]] * 2


def test_bilinear_of_two_values_is_the_known_row():
  x = jnp.asarray(np.array([0.0, 4.0], np.float32).reshape(1, 2, 1, 1))
  assert layers.resize(x, (4, 1)).ravel().tolist() == [0, 1, 3, 4]
  assert layers.resize(x, (8, 1)).ravel().tolist() == [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]
  down = jnp.asarray(np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1))
  assert layers.resize(down, (2, 1)).ravel().tolist() == [1.5, 5.5]  # no antialiasing: the two nearest alone


def linear_weights(old, new):
  """[new, old]: align_corners=False without antialiasing, edges repeated."""
  weights = np.zeros((new, old))
  for i in range(new):
    position = max((i + 0.5) * old / new - 0.5, 0)
    low = min(int(position), old - 1)
    weights[i, low] += 1 - (position - low)
    weights[i, min(low + 1, old - 1)] += position - low
  return weights


@pytest.mark.parametrize("size", [(14, 12), (9, 17), (3, 4), (7, 5), (7, 6)])
def test_bilinear_is_the_product_of_two_matrices(size):
  x = image(2, 7, 6, 3)
  expected = np.einsum("ph,qw,bhwc->bpqc", linear_weights(7, size[0]), linear_weights(6, size[1]), x)
  np.testing.assert_allclose(layers.resize(jnp.asarray(x), size), expected, rtol=1e-5, atol=1e-6)


def test_resize_to_the_same_size_is_the_input_itself():
  x = jnp.zeros((1, 4, 6, 2))
  assert layers.resize(x, (4, 6)) is x


def test_resize_keeps_the_dtype():
  assert layers.resize(jnp.zeros((1, 4, 6, 2), jnp.bfloat16), (8, 12)).dtype == jnp.bfloat16


def transposed(x, kernel, stride, padding):
  """out[s * i + a - padding] += x[i] @ kernel[a]."""
  size, out_width = kernel.shape[0], kernel.shape[3]
  height, width = ((side - 1) * stride + size for side in x.shape[1:3])
  out = np.zeros((x.shape[0], height, width, out_width))
  for i, j in np.ndindex(x.shape[1:3]):
    for a, b in np.ndindex(size, size):
      out[:, stride * i + a, stride * j + b] += x[:, i, j] @ kernel[a, b]
  return out[:, padding : height - padding, padding : width - padding]


DECONVS = [(2, 2, 0), (4, 2, 1), (3, 1, 1), (3, 2, 0)]


@pytest.mark.parametrize("size, stride, padding", DECONVS)
def test_transposed_convolution_is_its_definition(size, stride, padding):
  layer = layers.ConvTranspose(3, 5, size, stride=stride, padding=padding, kernel_init=NORMAL, **kinds())
  x = image(2, 4, 6, 3)
  expected = transposed(x, np.asarray(layer.kernel[...]), stride, padding)
  actual = layer(jnp.asarray(x))
  assert actual.shape[1:3] == tuple((side - 1) * stride - 2 * padding + size for side in (4, 6))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_group_norm_divides_by_the_root_of_variance_plus_epsilon(epsilon):
  norm = normalization.GroupNorm(6, groups=2, epsilon=epsilon, **kinds())
  x = image(2, 3, 4, 6, scale=1e-3)  # a variance of 1e-6: a wrong epsilon changes the result by a factor
  parts = x.astype(np.float64).reshape(2, 12, 2, 3)
  mean, var = (f(axis=(1, 3), keepdims=True) for f in (parts.mean, parts.var))
  expected = ((parts - mean) / np.sqrt(var + epsilon)).reshape(x.shape)
  np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_has_torch_epsilon():
  norm = normalization.LayerNorm(6, **kinds())
  x = image(2, 3, 6, scale=1e-3)
  wide = x.astype(np.float64)
  expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "norm", [normalization.LayerNorm, lambda w, **k: normalization.GroupNorm(w, groups=2, epsilon=1e-5, **k)]
)
def test_norms_do_not_lose_digits_to_a_large_mean(norm):
  x = image(2, 3, 4, 6)
  layer = norm(6, **kinds())
  far = jnp.asarray(x) + 1000
  np.testing.assert_allclose(layer(far), layer(far - 1000), atol=2e-4)  # x itself is rounded to 6e-5


def test_gelu_is_the_exact_one():
  x = jnp.asarray([-3.0, -1.0, 0.0, 0.5, 2.0])
  expected = [-0.00404970, -0.15865525, 0.0, 0.34573123, 1.95449974]  # x times the normal distribution's integral
  np.testing.assert_allclose(layers.GELU()(x), expected, rtol=1e-5, atol=1e-8)


def test_relu_has_gradient_0_at_0():
  assert jax.grad(lambda x: layers.ReLU()(x))(0.0) == 0


def test_silu_is_x_times_its_sigmoid():
  x = jnp.asarray([-2.0, 0.0, 3.0])
  np.testing.assert_allclose(layers.SiLU()(x), x / (1 + jnp.exp(-x)), rtol=1e-6)


@pytest.mark.parametrize("size, stride, expected", [(1, 1, (8, 10)), (3, 1, (8, 10)), (3, 2, (4, 5)), (7, 1, (8, 10))])
def test_convolutions_pad_both_sides_alike(size, stride, expected):
  layer = layers.conv(2, 4, size, stride=stride, **kinds())
  assert layer(jnp.zeros((1, 8, 10, 2))).shape == (1, *expected, 4)


def test_a_timestep_gives_the_same_embedding_as_one_number_and_as_an_array():
  one, many = layers.timestep_embedding(7, 32), layers.timestep_embedding(jnp.asarray([0, 7, 999]), 32)
  assert one.shape == (1, 32) and many.shape == (3, 32) and one.dtype == many.dtype == jnp.float32
  np.testing.assert_allclose(many[1:2], one, atol=1e-6)
  np.testing.assert_array_equal(many[0], [1.0] * 16 + [0.0] * 16)


@pytest.mark.reference
class TestAgainstTorch:
  def nchw(self, x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))

  def check(self, actual, expected, limit=1e-5):
    expected = np.moveaxis(expected.detach().numpy(), 1, -1)
    np.testing.assert_allclose(actual, expected, rtol=limit, atol=limit * np.abs(expected).max())

  def test_batch_norm(self):
    import torch

    norm, reference = batch_norm(), torch.nn.BatchNorm2d(3)
    for ours, theirs in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
      getattr(reference, theirs).data.copy_(torch.from_numpy(np.array(getattr(norm, ours)[...])))
    for step in range(3):
      x = image(4, 5, 6, 3, scale=1.0 + step, offset=step)
      self.check(norm(jnp.asarray(x), training=True), reference(self.nchw(x)))
    np.testing.assert_allclose(norm.mean[...], reference.running_mean, rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], reference.running_var, rtol=1e-6)
    reference.eval()
    self.check(norm(jnp.asarray(x), training=False), reference(self.nchw(x)))

  @pytest.mark.parametrize("mode", ["nearest", "bilinear"])
  @pytest.mark.parametrize("size", [(14, 12), (9, 17), (3, 4), (7, 5), (13, 11)])
  def test_resize(self, mode, size):
    import torch

    x = image(2, 7, 6, 3)
    self.check(
      layers.resize(jnp.asarray(x), size, method=mode),
      torch.nn.functional.interpolate(self.nchw(x), size=size, mode=mode),
    )

  @pytest.mark.parametrize("size, stride, padding", DECONVS)
  def test_transposed_convolution(self, size, stride, padding):
    import torch

    layer = layers.ConvTranspose(3, 5, size, stride=stride, padding=padding, kernel_init=NORMAL, **kinds())
    kernel = torch.from_numpy(np.array(layer.kernel[...]).transpose(2, 3, 0, 1).copy())  # HWIO -> IOHW
    x = image(2, 4, 6, 3)
    expected = torch.nn.functional.conv_transpose2d(self.nchw(x), kernel, stride=stride, padding=padding)
    self.check(layer(jnp.asarray(x)), expected)

  @pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
  def test_group_norm(self, epsilon):
    import torch

    x = image(2, 3, 4, 6, scale=1e-3)
    expected = torch.nn.functional.group_norm(self.nchw(x), 2, eps=epsilon)
    self.check(normalization.GroupNorm(6, groups=2, epsilon=epsilon, **kinds())(jnp.asarray(x)), expected)

  def test_gelu_and_layer_norm(self):
    import torch

    x = image(2, 7, 6, scale=3.0)
    wide = torch.from_numpy(x)
    np.testing.assert_allclose(layers.GELU()(jnp.asarray(x)), torch.nn.functional.gelu(wide), rtol=1e-5, atol=1e-6)
    expected = torch.nn.functional.layer_norm(wide, (6,))
    np.testing.assert_allclose(normalization.LayerNorm(6, **kinds())(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize("size, stride", [(1, 1), (3, 1), (3, 2)])
  def test_convolution(self, size, stride):
    import torch

    layer = layers.conv(3, 5, size, stride=stride, **kinds())
    kernel = torch.from_numpy(np.array(layer.kernel[...]).transpose(3, 2, 0, 1).copy())  # HWIO -> OIHW
    x = image(2, 8, 6, 3)
    expected = torch.nn.functional.conv2d(self.nchw(x), kernel, stride=stride, padding=(size - 1) // 2)
    self.check(layer(jnp.asarray(x)), expected)
