"""Fields of a config that nothing reads."""

import pytest

from vpd_jax import experiment
from vpd_jax.config import fields, loader

NYU, ROOMS = "configs/nyu_depth.py:tiny", "configs/rooms.py:{}"


@pytest.mark.parametrize(
  "config, field, value",
  [
    (NYU, "clip_norm", 1.0),
    (NYU, "optim.clip_nrom", 1.0),
    (NYU, "optim.schedule.warm_up", 1),
    (NYU, "optim.schedule.lr", 1.0),
    (NYU, "eval.batchsize", 1),
    (NYU, "eval.small_images", "whole"),  # of label maps
    (ROOMS.format("segmentation"), "eval.coverage", "full"),  # of all others
    (NYU, "mesh.fdsp", 2),
    (NYU, "init.weights", "x"),
    (NYU, "backbone.flash", True),
    (NYU, "backbone.unet.heads", 8),
    # Names that other sections have, or that the other parts give.
    (NYU, "neck.batch_size", 1),
    (NYU, "neck.norm_group", 3),
    (NYU, "head.tokenizer", ""),
    (NYU, "head.max_depth", 10.0),
    (NYU, "task.workers", 1),
    (NYU, "data.class_vectors", ""),
    (NYU, "method.root", ""),
    (NYU, "method.attention", "xla"),
    (NYU, "method.rngs", 0),
    (NYU + ",meta_prompts", "method.templates", "imagenet_80"),
    (NYU + ",meta_prompts", "method.class_vectors", "random:0"),
    (NYU + ",iedp", "method.templates", "imagenet_80"),
    (NYU + ",iedp", "method.class_vectors", "random:0"),
  ],
)
def test_a_field_that_nothing_reads_is_refused_in_one_line(config, field, value):
  made = loader.load(config).copy_and_resolve_references().unlock()
  *sections, name = field.split(".")
  section = made
  for part in sections:
    section = section[part]
  section[name] = value
  with pytest.raises(ValueError, match=rf"^config.*does not take \['{name}'\].*; remove or correct them\.$"):
    experiment.assemble(made.lock())


def test_what_may_be_meant_is_told_and_all_sections_at_once():
  made = loader.load(NYU).copy_and_resolve_references().unlock()
  made.optim.clip_nrom, made.mesh.rule = 1.0, ()
  with pytest.raises(ValueError, match=r"optim does not take \['clip_nrom'\] \(did you mean clip_norm\?\).*\['rule'\]"):
    experiment.assemble(made.lock())


@pytest.mark.parametrize(
  "section, left, message",
  [
    ("task", {"name": "depth"}, r"^config\.task of name 'depth' needs \['max_depth'\]; set them\.$"),
    ("optim.schedule", {"name": "poly"}, r"^config\.optim\.schedule of name 'poly' needs \['num_steps'\]"),
    ("backbone.vae", "large", r"^config\.backbone\.vae='large' must be a section"),
    ("head", "deconv", r"^config\.head\.name=None is unknown; choose one of"),
  ],
)
def test_a_section_without_what_it_needs_is_refused(section, left, message):
  made = loader.load(NYU).to_dict()
  *outer, name = section.split(".")
  held = made[outer[0]] if outer else made
  held[name] = left
  with pytest.raises(ValueError, match=message):
    experiment.assemble(loader.ml_collections.ConfigDict(made))


def test_a_head_of_another_task_is_refused():
  made = loader.load(ROOMS.format("segmentation")).to_dict()
  made["head"] = {"name": "deconv"}
  with pytest.raises(ValueError, match=r"^config\.head of name 'deconv' does not accept \['classes'\], which"):
    experiment.assemble(loader.ml_collections.ConfigDict(made))


def test_the_table_holds_what_the_configs_of_the_package_have():
  for path in sorted((loader.PROJECT / "configs").glob("*.py")):
    config = loader.load(str(path))
    fields.check(config)
    for name, known in fields.FIELDS.items():
      optional = {"eval": {"coverage", "small_images"}, "backbone": {"vit"}, "init": {"vit"}}.get(name, set())
      assert set(known) - optional == set(config[name] if name else config) - optional, (path, name)


@pytest.mark.parametrize("old, new", fields.RENAMED.items())
def test_a_renamed_option_is_refused_with_its_new_name_and_an_old_workdir_still_resumes(old, new):
  section, old_name = old.split(".")
  new_name = new.split(".")[1]
  message = fields.unknown({old_name: 1}, (new_name,), f"config.{section} of name 'x'")
  assert message == f"config.{section} of name 'x': {old_name} is now {new_name}; rename it in your config"
  assert loader.differences({section: {old_name: 1}}, {section: {new_name: 1}}, (section,)) == []
  assert loader.differences({section: {old_name: 1}}, {section: {new_name: 2}}, (section,)) == [f"{new}: 1 -> 2"]


@pytest.mark.parametrize("field, before", fields.ADDED.items())
def test_a_workdir_from_before_an_option_resumes_where_it_does_as_before(field, before):
  section, _, name = field.partition(".")
  old = {section: {"crop": 1}} if name else {}
  new = lambda value: {section: {"crop": 1, name: value} if name else value}
  assert loader.differences(old, new(before), (section,)) == []
  changed = loader.differences(old, new("other"), (section,))
  assert changed == ([] if field in loader.RESUME_IGNORED else [f"{field}: {before!r} -> 'other'"])


def test_a_factor_on_the_latents_is_compared_as_the_method_takes_it():
  config = lambda scale, own=0.18215: {"method": {"latent_scale": scale}, "backbone": {"vae": {"latent_scale": own}}}
  before = {"method": {"latent_scale": 0.18215}, "backbone": {"vae": {"channels": 1}}}
  assert (
    loader.differences(before, {**config(0.0), "backbone": {"vae": {"channels": 1, "latent_scale": 0.18215}}}) == []
  )
  assert loader.differences(config(1.0), config(0.0)) == ["method.latent_scale: 1.0 -> 0.18215"]
  assert loader.differences(config(0.0), config(0.0, 0.5)) == [
    "backbone.vae.latent_scale: 0.18215 -> 0.5",
    "method.latent_scale: 0.18215 -> 0.5",
  ]


def test_a_renamed_option_on_the_command_line_is_refused_with_its_new_name():
  argv = ["main", "--config=configs/nyu_depth.py:tiny", "--config.data.colour=False"]
  with pytest.raises(ValueError, match=r"config\.data\.colour is now config\.data\.color_jitter"):
    loader.resolve_argv(argv)
