"""A method is one file and one row of the registry: configs of all tasks take it as they are."""

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import tiny
from tests.helpers.constant_method import Constant
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.config.presets import registry
from vpd_jax.types import Method

CONFIGS = (
  *(f"configs/rooms.py:{task},constant,tiny" for task in registry.SECTIONS),
  *("configs/nyu_depth.py:constant,tiny", "configs/cityscapes_seg.py:constant,tiny"),
  *("configs/refcoco_refer.py:constant,tiny", "configs/coco_pose.py:constant,tiny"),
)


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setitem(registry.METHODS, "constant", "tests.helpers.constant_method:Constant")
  monkeypatch.setitem(experiment.METHODS, "constant", Constant)


@pytest.mark.parametrize("string", CONFIGS)
def test_configs_of_all_tasks_take_a_registered_method(registered, string):
  exp = experiment.assemble(tiny.shrunk(loader.load(string)))
  batch = {"image": jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)}
  outputs = jax.eval_shape(lambda n, b: exp.spec.merge(n)(b, training=False), exp.spec.shapes, batch)
  assert all(x.shape[0] == 2 for x in outputs.values())


def test_a_method_that_is_not_registered_is_refused():
  with pytest.raises(ValueError, match=r"'constant' is unknown"):
    loader.load("configs/rooms.py:depth,constant,tiny")


@pytest.mark.parametrize("name", registry.METHODS)
def test_registered_methods_declare_what_the_protocol_asks_for(name):
  config = tiny.shrunk(loader.load(f"configs/rooms.py:depth,{name},tiny"))
  method = experiment.assemble(config).method
  members = {*Method.__annotations__, *(name for name in vars(Method) if not name.startswith("_"))}
  assert {"prepare", "map_info", "latents"} <= members and {n for n in members if not hasattr(method, n)} == set()
