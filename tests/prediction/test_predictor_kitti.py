"""A plain frame of KITTI in prediction: the benchmark's rows, at the scale of training."""

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.data.datasets import kitti
from vpd_jax.prediction.predictor import Predictor


@pytest.mark.parametrize(
  "size, rows",
  [((375, 1242), 23), ((370, 1224), 18), ((352, 1216), 0), ((351, 1216), 0), ((480, 1300), 0), ((375, 1400), 0)],
)
def test_only_frames_as_kitti_has_them_lose_rows(size, rows):
  assert kitti.Kitti.info({"kb_crop": (352, 1216)}).cut_top(size) == kitti.Kitti.info({}).cut_top(size) == rows
  assert kitti.Kitti.info({"kb_crop": ()}).cut_top(size) == 0


def test_the_rows_above_the_benchmarks_are_nan_and_the_others_those_of_the_cut_frame():
  config = tiny.shrunk(loader.load("configs/kitti_depth.py:vpd,tiny")).unlock()
  config.data.update(kb_crop=(64, 96), resize=())
  config.eval.test_time, config.eval.batch_size = (), 1
  exp = experiment.assemble(config.lock(), training=False)
  named = {name: jax.numpy.asarray(x) for name, x in tiny.filled(exp.spec.shapes).items()}
  predictor = Predictor(config, exp, (named, {}, {}), [])
  frame = np.random.default_rng(0).random((68, 100, 3), np.float32)
  whole, cut = (predictor.predict([picture], class_id=0)[0]["depth"] for picture in (frame, frame[4:]))
  assert whole.shape == (68, 100) and whole.dtype == np.float32
  assert np.isnan(whole[:4]).all()
  np.testing.assert_array_equal(whole[4:], cut)
