"""What is kept of a moment against the formula, in closed form; and what is trained with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpd_jax import moments, optim

SHAPE = (3, 3, 40, 64)  # blocks along the first three axes: 360 numbers, two blocks of 180
GRIDS = {
  False: np.sign(np.arange(-127, 128)) * (np.arange(-127, 128) / 127) ** 2,
  True: np.r_[0, (np.arange(2, 256) / 255) ** 4],
}


def values(second, seed=0, shape=SHAPE):
  """Numbers over twelve decades, whole blocks of zeros and lone zeros among them; negative ones of a first moment."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * 10 ** rng.uniform(-6, 6, shape)
  x[..., 0] = 0
  x[0, 0] = 0
  return np.float32(np.square(x) if second else x)


def scales(x):
  """The largest magnitude of each number's block, of an array of SHAPE."""
  tops = np.abs(x.reshape(2, 180, 64)).max(1, keepdims=True)
  return np.broadcast_to(tops, (2, 180, 64)).reshape(x.shape)


def kept(x, second, noise=None):
  like = moments.zeros(jnp.asarray(x), "int8", second=second)
  made = moments.quantize(jnp.asarray(x), like, second=second, noise=noise)
  assert isinstance(made, moments.Blocks) and made.codes.shape == x.shape
  return made, np.asarray(moments.dequantize(made, jnp.float32))


def noise(seed, shape, number=1):
  return moments.noise(jax.random.bits(jax.random.key(seed), (2,), jnp.uint32), np.uint32([number, number + 1]), shape)


def test_noise_is_uniform_and_differs_by_moment_place_array_and_step():
  draws = [
    np.float64(x).ravel() / 2**16 for seed, number in ((0, 1), (0, 2), (1, 1)) for x in noise(seed, SHAPE, number)
  ]
  for x in draws:
    shares = np.histogram(x, 16, (0, 1))[0] / x.size
    np.testing.assert_allclose(shares, 1 / 16, atol=5 * np.sqrt(1 / 16 / x.size))
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 5 / np.sqrt(x.size)
  assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 5 / np.sqrt(draws[0].size)


@pytest.mark.parametrize("second", [False, True])
def test_int8_rounds_to_the_nearest_number_of_the_map(second):
  x = values(second)
  made, back = kept(x, second)
  top = scales(x).astype(np.float64)
  share = np.divide(x, top, out=np.zeros_like(top), where=top > 0)
  grid = GRIDS[second]
  right = np.clip(np.searchsorted(grid, share), 1, len(grid) - 1)
  gap = grid[right] - grid[right - 1]
  error = np.abs(back - x)
  bound = np.where(share < grid[1], grid[1], gap / 2) if second else gap / 2
  assert (error <= top * bound * (1 + 1e-4) + 1e-37).all()
  assert (np.sign(back) == np.sign(x))[np.abs(share) > (0 if second else 0.5001 / 127**2)].all()
  np.testing.assert_array_equal(back[x == 0], 0)
  largest = np.abs(x) == top
  np.testing.assert_allclose(back[largest], x[largest], rtol=1e-6)
  assert made.scales.shape == (2, 64) and made.codes.dtype == (jnp.uint8 if second else jnp.int8)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_extreme_scales_change_the_scale_alone(second, scale):
  x = np.clip(np.abs(values(second)), 1e-4, 1e4).astype(np.float32)
  plain, scaled = kept(x, second), kept(x * np.float32(scale), second)
  np.testing.assert_array_equal(plain[0].codes, scaled[0].codes)
  np.testing.assert_allclose(scaled[1], plain[1] * np.float32(scale), rtol=1e-6)


@pytest.mark.parametrize("second", [False, True])
def test_random_rounding_takes_a_neighbor_and_keeps_the_mean(second):
  x = np.clip(np.abs(values(second)), 1e-2, None).astype(np.float32)
  x = np.broadcast_to(x[..., 1:2], SHAPE).copy()  # the same numbers under each of 64 scales
  total = np.zeros(SHAPE[:3])
  for draw in range(16):
    drawn = noise(draw, SHAPE)[second]
    assert int(drawn.max()) < 2**16
    _, back = kept(x, second, drawn)
    total += back.mean(-1, dtype=np.float64) / 16
  grid, top = GRIDS[second], scales(x)[..., 0].astype(np.float64)
  share = x[..., 0] / top
  above = share > grid[1] if second else share > 0
  right = np.clip(np.searchsorted(grid, share), 1, len(grid) - 1)
  gap = (grid[right] - grid[right - 1]) * top
  assert (np.abs(total - x[..., 0]) < 5.5 * gap / 2 / 32)[above].all()  # 1024 draws, each off by half a gap at most


def test_bfloat16_rounds_a_second_moment_at_random_and_a_first_one_to_the_nearest():
  x = np.full((64, 64), 1 + 2**-9, np.float32)  # a quarter of the way from 1 to 1 + 2^-7
  like = moments.zeros(jnp.asarray(x), "bfloat16", second=True)
  drawn = noise(0, x.shape)
  second = moments.quantize(jnp.asarray(x), like, second=True, noise=drawn[1])
  assert second.dtype == jnp.bfloat16 and set(np.unique(np.float32(second))) == {1, 1 + 2**-7}
  assert np.float32(second).mean() == pytest.approx(1 + 2**-9, abs=2**-7 / 64 * 2)
  first = moments.quantize(jnp.asarray(x), like, second=False, noise=drawn[0])
  np.testing.assert_array_equal(np.float32(first), 1)
  strange = jnp.asarray([jnp.inf, jnp.nan])
  last = moments.quantize(strange, like, second=True, noise=jnp.full(2, 2**16 - 1, jnp.uint32))
  np.testing.assert_array_equal(np.float32(last), strange)


@pytest.mark.parametrize(
  "shape, expected",
  [
    ((3, 3, 320, 640), (12, 240)),
    ((1280, 10240), (5, 256)),
    ((5120, 1280), (5, 256)),
    ((257, 512), (2, 129)),
    ((3, 3, 4, 320), (1, 36)),
    ((10240,), (0, 0)),
    ((64, 32), (0, 0)),
    ((), (0, 0)),
    ((0, 8), (0, 0)),
  ],
)
def test_blocks_are_of_equal_length_and_small_arrays_have_none(shape, expected):
  assert moments.layout(shape) == expected
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  held = jax.eval_shape(lambda x: moments.zeros(x, "int8", second=True), x)
  assert isinstance(held, moments.Blocks) == bool(expected[0])
  if expected == (2, 129):  # the last block is filled up
    x = values(False, shape=shape)
    made, back = kept(x, False)
    assert made.scales.shape == (2, 512)
    np.testing.assert_allclose(np.abs(back).max(0), np.abs(x).max(0), rtol=1e-6)


def trained(kind, steps=60):
  """A parameter's way towards 0 by gradients of its own size with noise, of three arrays of which one has blocks."""
  shapes = {"a/kernel": (64, 96), "a/bias": (96,)}
  groups = optim.groups(shapes, ((r"", 1.0),), ((r"", 0.0),))
  options = {"decay": 0.0, "b1": 0.9, "b2": 0.999, "epsilon": 1e-8, "clip_norm": 0.0}
  chain = optim.optimizer(lambda step: jnp.float32(1e-2), groups, **options, moments=kind)
  params = {name: jnp.ones(shape) for name, shape in shapes.items()}

  def step(carry, key):
    params, state = carry
    grads = {n: p * (1 + jax.random.normal(jax.random.fold_in(key, p.ndim), p.shape)) for n, p in params.items()}
    updates, state = chain.update(grads, state, params)
    return ({n: p + updates[n] for n, p in params.items()}, state), None

  keys = jax.random.split(jax.random.key(1), steps)
  return jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])((params, chain.init(params)))


def test_training_goes_the_same_way_with_all_kinds_and_says_what_each_takes():
  ends = {kind: trained(kind) for kind in moments.FORMATS}
  means = {kind: float(jnp.mean(params["a/kernel"])) for kind, (params, _) in ends.items()}
  assert means["bfloat16"] == pytest.approx(means["float32"], rel=0.02)
  assert means["int8"] == pytest.approx(means["float32"], rel=0.05) and means["float32"] < 0.7
  size = {kind: sum(x.nbytes for x in jax.tree.leaves(state[1].mu)) for kind, (_, state) in ends.items()}
  assert size == {"float32": 4 * 6240, "bfloat16": 2 * 6240, "int8": 6144 + 4 * 96 + 4 * 96}


def test_a_second_moment_that_changes_by_less_than_a_code_keeps_moving():
  """The gradient falls to a hundredth: after 700 steps the second moment has halved, in a million steps of rounding."""
  x = jnp.full((64, 96), 1.0)
  for kind in ("bfloat16", "int8"):
    held = moments.quantize(x.at[0].set(4.0), moments.zeros(x, kind, second=True), second=True)

    def step(held, words):
      now = 0.999 * moments.dequantize(held, jnp.float32) + 1e-7
      return moments.quantize(now, held, second=True, noise=moments.noise(words, np.uint32([7, 8]), x.shape)[1]), None

    last = jax.lax.scan(step, held, jax.random.bits(jax.random.key(0), (693, 2), jnp.uint32))[0]
    assert float(moments.dequantize(last, jnp.float32)[1:].mean()) == pytest.approx(0.5, rel=0.02)


def test_an_unknown_word_is_refused():
  with pytest.raises(ValueError, match=r"^config\.optim\.moments='int4' is unknown; choose one of \('float32', 'bfl"):
    trained("int4")
