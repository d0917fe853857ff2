"""Furniture of the procedural rooms, as lists of solids in the object's own coordinates.

An object stands on z = 0; its back is at negative y. Each function samples its dimensions from `rng`.
"""

from typing import NamedTuple

import numpy as np

from vpd_jax.data.rooms.render import BOOKS, BOX, CYLINDER, ELLIPSOID, NOISE, PANELS, PLAIN, STRIPES

FIRST, SECOND, PALE, DARK = range(4)  # colors of a solid: two of the object, two common to all objects


class Solid(NamedTuple):
  """A solid: shape, center and half extent in meters, color, texture and size of its cells."""

  shape: int
  center: tuple[float, float, float]
  half: tuple[float, float, float]
  color: int = FIRST
  texture: int = PLAIN
  pitch: float = 0.2


class Object(NamedTuple):
  """A piece of furniture: class name, half width and half depth in meters, solids, height of a free top or 0."""

  name: str
  half_width: float
  half_depth: float
  solids: list[Solid]
  top: float = 0.0


def box(x: float, y: float, z: float, half: tuple[float, float, float], *look) -> Solid:
  """A box whose underside is at z."""
  return Solid(BOX, (x, y, z + half[2]), half, *look)


def legs(a: float, b: float, height: float, radius: float) -> list[Solid]:
  """Four round legs at (+-a, +-b)."""
  return [Solid(CYLINDER, (x, y, height / 2), (radius, radius, height / 2), SECOND) for x in (-a, a) for y in (-b, b)]


def bed(rng: np.random.Generator) -> Object:
  a, b, height = rng.uniform(0.5, 0.85), rng.uniform(0.95, 1.05), rng.uniform(0.18, 0.3)
  solids = [
    box(0, 0, 0, (a, b, height / 2), SECOND),
    box(0, 0.02, height, (a - 0.02, b - 0.04, 0.11), FIRST, rng.choice([PLAIN, STRIPES, NOISE]), 0.2),
    box(0, -b + 0.03, 0, (a, 0.03, rng.uniform(0.4, 0.6)), SECOND),
    Solid(ELLIPSOID, (-a / 2, 0.28 - b, height + 0.24), (a * 0.42, 0.2, 0.09), PALE),
    Solid(ELLIPSOID, (a / 2, 0.28 - b, height + 0.24), (a * 0.42, 0.2, 0.09), PALE),
  ]
  return Object("bed", a, b, solids)


def table(rng: np.random.Generator) -> Object:
  a, b, height = rng.uniform(0.4, 0.9), rng.uniform(0.3, 0.5), rng.uniform(0.62, 0.78)
  solids = [box(0, 0, height - 0.04, (a, b, 0.02)), *legs(a - 0.06, b - 0.06, height - 0.04, 0.03)]
  return Object("table", a, b, solids, height)


def chair(rng: np.random.Generator) -> Object:
  a, height, back = rng.uniform(0.2, 0.25), rng.uniform(0.42, 0.48), rng.uniform(0.2, 0.3)
  solids = [
    box(0, 0, height - 0.05, (a, a, 0.025)),
    box(0, 0.025 - a, height + 0.05, (a, 0.02, back)),
    *legs(a - 0.03, a - 0.03, height - 0.05, 0.02),
  ]
  return Object("chair", a, a, solids)


def sofa(rng: np.random.Generator) -> Object:
  a, b = rng.uniform(0.7, 1.1), rng.uniform(0.38, 0.46)
  solids = [
    box(0, 0, 0.05, (a, b, 0.18)),
    box(0, 0.1 - b, 0.05, (a, 0.1, 0.38), FIRST),
    box(0.1 - a, 0, 0.05, (0.1, b, 0.27), SECOND),
    box(a - 0.1, 0, 0.05, (0.1, b, 0.27), SECOND),
  ]
  return Object("sofa", a, b, solids)


def cabinet(rng: np.random.Generator) -> Object:
  a, b, half = rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.32), rng.uniform(0.35, 1.0)
  return Object("cabinet", a, b, [box(0, 0, 0, (a, b, half), FIRST, PANELS)], 2 * half if half < 0.6 else 0.0)


def counter(rng: np.random.Generator) -> Object:
  a, b = rng.uniform(0.6, 1.3), 0.31
  solids = [
    box(0, 0, 0, (a, b - 0.02, 0.43), FIRST, PANELS),
    box(0, 0, 0.86, (a, b, 0.02), SECOND),
    box(0, -0.14, 1.45, (a, 0.17, 0.35), FIRST, PANELS),
  ]
  return Object("cabinet", a, b, solids, 0.9)


def shelf(rng: np.random.Generator) -> Object:
  a, b, half = rng.uniform(0.35, 0.7), rng.uniform(0.14, 0.2), rng.uniform(0.5, 1.0)
  solids = [
    box(0, 0, 0, (a, b - 0.02, half), FIRST, BOOKS, 0.33),
    box(-a, 0, 0, (0.02, b, half), SECOND),
    box(a, 0, 0, (0.02, b, half), SECOND),
    box(0, 0, 2 * half, (a + 0.02, b, 0.015), SECOND),
  ]
  return Object("shelf", a + 0.02, b, solids)


def floor_lamp(rng: np.random.Generator) -> Object:
  height = rng.uniform(1.3, 1.7)
  solids = [
    Solid(CYLINDER, (0, 0, 0.015), (0.14, 0.14, 0.015), DARK),
    Solid(CYLINDER, (0, 0, height / 2), (0.018, 0.018, height / 2), DARK),
    Solid(CYLINDER, (0, 0, height), (0.18, 0.18, 0.14)),
  ]
  return Object("lamp", 0.18, 0.18, solids)


def table_lamp(rng: np.random.Generator) -> Object:
  height = rng.uniform(0.25, 0.4)
  solids = [
    Solid(CYLINDER, (0, 0, height / 2), (0.03, 0.03, height / 2), DARK),
    Solid(CYLINDER, (0, 0, height), (0.12, 0.12, 0.09)),
  ]
  return Object("lamp", 0.12, 0.12, solids)


def carton(rng: np.random.Generator) -> Object:
  a, b, c = rng.uniform(0.1, 0.24, 3)
  return Object("box", a, b, [box(0, 0, 0, (a, b, c), FIRST, rng.choice([PLAIN, STRIPES]), 0.12)], 0.0)


def ball(rng: np.random.Generator) -> Object:
  r = rng.uniform(0.1, 0.22)
  return Object("ball", r, r, [Solid(ELLIPSOID, (0, 0, r), (r, r, r))])


def vase(rng: np.random.Generator) -> Object:
  r, height = rng.uniform(0.06, 0.11), rng.uniform(0.1, 0.2)
  solids = [
    Solid(ELLIPSOID, (0, 0, height), (r, r, height)),
    Solid(CYLINDER, (0, 0, 1.9 * height), (r / 2, r / 2, 0.3 * height)),
  ]
  return Object("vase", r, r, solids)


def plant(rng: np.random.Generator) -> Object:
  r, height = rng.uniform(0.15, 0.22), rng.uniform(0.25, 0.5)
  leaves = [
    Solid(ELLIPSOID, (*rng.normal(0, 0.4 * r, 2), 0.4 + height * t), (r, r, height / 2), FIRST, NOISE, 0.2)
    for t in (0.3, 0.7)
  ]
  return Object("plant", r, r, [Solid(CYLINDER, (0, 0, 0.15), (0.14, 0.14, 0.15), SECOND), *leaves])


# By scene: furniture along the walls, free-standing furniture, small objects on tops.
MIXES = {
  "bedroom": ((bed, cabinet, shelf, cabinet), (chair, floor_lamp, plant), (table_lamp, carton, vase)),
  "kitchen": ((counter, counter, cabinet), (table, chair, chair, chair), (vase, carton, vase)),
  "office": ((table, shelf, cabinet, table), (table, chair, chair, plant), (table_lamp, carton, vase)),
  "classroom": ((shelf, cabinet), (table, chair, table, chair, table, chair), (carton, ball, vase)),
  "playroom": ((sofa, shelf, bed), (ball, table, chair, floor_lamp), (ball, carton, carton, ball)),
}
