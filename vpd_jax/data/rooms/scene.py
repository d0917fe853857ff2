"""Random rooms: walls, openings, furniture, a figure, a lamp and a camera, as parts for `render`."""

from typing import NamedTuple

import numpy as np

from vpd_jax.data.rooms import figure, furniture, render
from vpd_jax.data.rooms.furniture import DARK, FIRST, PALE, SECOND, Object, Solid

CLASSES = (
  *("wall", "floor", "ceiling", "window", "door", "picture", "rug", "bed", "table", "chair", "sofa", "cabinet"),
  *("shelf", "lamp", "box", "ball", "vase", "plant", "person"),
)
SCENES = tuple(furniture.MIXES)
COLORS = {
  "red": (0.72, 0.14, 0.11),
  "orange": (0.85, 0.45, 0.1),
  "yellow": (0.86, 0.74, 0.18),
  "green": (0.2, 0.5, 0.2),
  "blue": (0.15, 0.28, 0.68),
  "purple": (0.42, 0.2, 0.55),
  "pink": (0.85, 0.5, 0.6),
  "brown": (0.4, 0.24, 0.12),
  "grey": (0.45, 0.45, 0.45),  # this spelling is in the sentences of published runs and of prepared data
  "black": (0.1, 0.1, 0.11),
  "white": (0.9, 0.9, 0.88),
}
WOODS = ((0.55, 0.36, 0.2), (0.42, 0.26, 0.14), (0.7, 0.52, 0.33), (0.3, 0.2, 0.13), (0.75, 0.7, 0.62))
SKINS = ((0.9, 0.7, 0.58), (0.76, 0.54, 0.4), (0.5, 0.33, 0.22), (0.33, 0.21, 0.15))
MAX_DIAGONAL = 9.8  # meters; keeps all depths below 10
FIGURE_CHANCE = 0.5
HAZE = 0.16  # 1/meter
CAMERA_CLEARANCE = 1.0  # meters of free floor around the camera


class Scene(NamedTuple):
  """A room.

  Attributes:
    parts, camera, light: the input of `render`.
    names: (color, class name) of every instance, number 1 first.
    joints: float32 [17, 3], COCO keypoints in world coordinates, or None if the room has no figure.
  """

  parts: render.Parts
  camera: render.Camera
  light: render.Light
  names: list[tuple[str, str]]
  joints: np.ndarray | None


def build(rng: np.random.Generator, scene: str) -> Scene:
  """Builds a random room of a scene of SCENES."""
  room = Builder(rng)
  room.shell()
  room.openings()
  room.furnish(*furniture.MIXES[scene])
  joints = room.stand_figure() if rng.random() < FIGURE_CHANCE else None
  return Scene(room.parts(), room.camera, room.light(), room.names, joints)


class Builder:
  """Builds the list of parts of a room. `occupied` has the (x, y, half width, half depth) of occupied floor."""

  def __init__(self, rng: np.random.Generator):
    self.rng = rng
    size = np.array([rng.uniform(2.8, 7.0), rng.uniform(2.8, 8.0), rng.uniform(2.3, 3.1)])
    self.size = size * min(1.0, MAX_DIAGONAL / np.linalg.norm(size))
    self.rows, self.names, self.occupied, self.tops, self.spans = [], [], [], [], {}
    self.camera = self._camera()
    self.occupied.append((*self.camera.origin[:2], CAMERA_CLEARANCE, CAMERA_CLEARANCE))

  def _camera(self) -> render.Camera:
    """A camera at a random place that looks across the room."""
    rng = self.rng
    side = rng.permutation([rng.uniform(0.05, 0.2), rng.uniform(0.1, 0.9)])  # near one of the walls
    spot = np.where(rng.random(2) < 0.5, side, 1 - side) * self.size[:2]
    origin = np.array([*np.clip(spot, 0.3, self.size[:2] - 0.3), rng.uniform(1.1, 1.8)])
    target = self.size[:2] * rng.uniform(0.4, 0.6, 2) - origin[:2]
    yaw = np.arctan2(target[1], target[0]) + rng.normal(0, 0.12)
    pitch = np.clip(rng.normal(-0.18, 0.08), -0.4, 0.05)
    return render.look(origin, yaw, pitch, rng.normal(0, 0.02))

  def add(self, solid: Solid, frame: np.ndarray, center: np.ndarray, colors: np.ndarray, name: str, instance: int):
    """Adds a solid as a part, with frame and center in room coordinates."""
    self.rows.append(
      (solid.shape, center, solid.half, frame, colors, solid.texture, solid.pitch, CLASSES.index(name), instance)
    )

  def parts(self) -> render.Parts:
    dtypes = (np.int8, np.float32, np.float32, np.float32, np.float32, np.int8, np.float32, np.uint8, np.int32)
    return render.Parts(
      *(np.array(column, dtype) for column, dtype in zip(zip(*self.rows, strict=True), dtypes, strict=True))
    )

  def color(self) -> tuple[str, np.ndarray]:
    """A named color and a variation of it."""
    name = list(COLORS)[self.rng.integers(len(COLORS))]
    return name, np.clip(np.array(COLORS[name]) * self.rng.uniform(0.8, 1.15) + self.rng.normal(0, 0.02, 3), 0.03, 0.95)

  def wood(self) -> np.ndarray:
    return np.array(WOODS[self.rng.integers(len(WOODS))]) * self.rng.uniform(0.8, 1.15)

  def put(self, thing: Object, place: tuple[float, float, float], yaw: float, color: np.ndarray, instance: int):
    """Adds the solids of an object at `place`, rotated by `yaw` from x towards y."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    frame = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    wood = self.wood()
    palette = {FIRST: color, SECOND: wood, PALE: np.array([0.85, 0.84, 0.8]), DARK: np.array([0.13, 0.13, 0.14])}
    for solid in thing.solids:
      first = palette[solid.color]
      second = first * 0.55 if solid.texture == render.PANELS else 0.3 * first + 0.7 * wood
      center = np.array(place) + np.array(solid.center) @ frame
      self.add(solid, frame, center, np.stack([first, second]), thing.name, instance)

  def new_instance(self, color: str, name: str) -> int:
    self.names.append((color, name))
    return len(self.names)

  def shell(self):
    """Floor, ceiling and four walls: slabs around the room, with their own textures."""
    rng, (width, length, height) = self.rng, self.size
    wall = np.clip(0.74 + 0.1 * rng.normal(size=3) * rng.uniform(0.2, 1), 0.3, 0.95)
    walls = (rng.choice([render.PLAIN, render.STRIPES, render.TILES, render.NOISE]), rng.uniform(0.18, 0.3))
    floor = self.wood() if rng.random() < 0.6 else np.full(3, rng.uniform(0.3, 0.75)) + rng.normal(0, 0.05, 3)
    covering = int(rng.choice([render.PLANKS, render.CHECKER, render.TILES, render.NOISE], p=[0.4, 0.25, 0.25, 0.1]))
    pitch = {render.PLANKS: 0.22, render.CHECKER: 0.4, render.TILES: 0.4, render.NOISE: 0.5}[covering]
    slabs = [
      ((width / 2, length / 2, -0.1), (width / 2 + 0.2, length / 2 + 0.2, 0.1), "floor", covering, pitch, floor),
      ((width / 2, length / 2, height + 0.1), (width / 2 + 0.2, length / 2 + 0.2, 0.1), "ceiling", 0, 0.6, wall),
    ]
    for x in (-0.1, width + 0.1):
      slabs.append(((x, length / 2, height / 2), (0.1, length / 2 + 0.2, height / 2 + 0.2), "wall", *walls, wall))
    for y in (-0.1, length + 0.1):
      slabs.append(((width / 2, y, height / 2), (width / 2 + 0.2, 0.1, height / 2 + 0.2), "wall", *walls, wall))
    for center, half, name, texture, size, first in slabs:
      first = 0.4 * first + 0.5 if name == "ceiling" else first * rng.uniform(0.93, 1.0)
      second = first * (0.6 if name == "floor" else 0.82)
      solid = Solid(render.BOX, center, half, FIRST, int(texture), size * rng.uniform(0.9, 1.1))
      self.add(solid, np.eye(3), np.array(center), np.stack([first, second]), name, 0)

  def wall_place(self, wall: int, along: float, gap: float) -> tuple[float, float]:
    """Floor position `along` meters from the middle of a wall, `gap` meters off; wall k faces (k + 1) * 90 degrees."""
    reach = self.size[1 - wall % 2] / 2
    x_axis = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)][wall])
    inward = np.array([-x_axis[1], x_axis[0]])
    return tuple(self.size[:2] / 2 + along * x_axis + (gap - reach) * inward)

  def openings(self):
    """A door, windows and pictures on the walls, side by side."""
    rng = self.rng
    for name in ["door", *["window"] * rng.integers(0, 3), *["picture"] * rng.integers(1, 4)]:
      half = {
        "door": (rng.uniform(0.4, 0.48), 0.03, rng.uniform(0.98, 1.05)),
        "window": (rng.uniform(0.4, 0.9), 0.02, rng.uniform(0.4, 0.6)),
        "picture": (rng.uniform(0.2, 0.55), 0.02, rng.uniform(0.2, 0.4)),
      }[name]
      wall, middle = int(rng.integers(4)), half[2] if name == "door" else rng.uniform(1.4, 1.6)
      room = self.size[wall % 2] / 2 - half[0] - 0.1
      along = rng.uniform(-room, room) if room > 0 else 0.0
      spans = self.spans.setdefault(wall, [])
      if room <= 0 or any(abs(along - other) < half[0] + width + 0.1 for other, width in spans):
        continue
      spans.append((along, half[0]))
      self._hang(name, half, (*self.wall_place(wall, along, 0.0), middle), wall * np.pi / 2)

  def _hang(self, name: str, half: tuple[float, float, float], place: tuple[float, float, float], yaw: float):
    """Adds an object on a wall, with its frame."""
    color, first = self.color()
    if name == "window":
      color, first = "bright", np.array([0.75, 0.85, 0.95])
    texture = {"door": render.PANELS, "window": render.SKY, "picture": render.PAINTING}[name]
    border = Solid(render.BOX, (0, 0, 0), (half[0] + 0.05, half[1] * 0.8, half[2] + 0.05), SECOND)
    pane = Solid(render.BOX, (0, 0, 0), half, FIRST, texture)
    bars = [Solid(render.BOX, (0, 0, 0), (0.025, half[1] + 0.01, half[2]), PALE)] if name == "window" else []
    self.put(Object(name, 0, 0, [border, pane, *bars]), place, yaw, first, self.new_instance(color, name))

  def free(self, x: float, y: float, a: float, b: float) -> bool:
    """Whether a rectangle of half sizes (a, b) around (x, y) is inside the room and unoccupied."""
    width, length = self.size[:2]
    if x - a < 0 or y - b < 0 or x + a > width or y + b > length:
      return False
    return all(abs(x - u) > a + c or abs(y - v) > b + d for u, v, c, d in self.occupied)

  def place(self, thing: Object, spot, tries: int = 6) -> bool:
    """Places an object on free floor at a sample (x, y, yaw) of `spot`; False if all tries fail."""
    for _ in range(tries):
      x, y, yaw = spot(thing)
      cos, sin = abs(np.cos(yaw)), abs(np.sin(yaw))
      a, b = thing.half_width * cos + thing.half_depth * sin, thing.half_width * sin + thing.half_depth * cos
      if self.free(x, y, a - 1e-3, b - 1e-3):
        self.occupied.append((x, y, a, b))
        self.put_new(thing, (x, y, 0.0), yaw)
        if thing.top:
          self.tops.append((x, y, thing))
        return True
    return False

  def put_new(self, thing: Object, place: tuple[float, float, float], yaw: float):
    """Adds an object with a random named color; much furniture is wooden."""
    color, rgb = self.color()
    if thing.name in ("table", "cabinet", "shelf") and self.rng.random() < 0.6:
      color, rgb = "wooden", self.wood()
    if thing.name == "plant":
      color, rgb = "green", np.array([0.15, 0.4, 0.12]) * self.rng.uniform(0.7, 1.3)
    self.put(thing, place, yaw, rgb, self.new_instance(color, thing.name))

  def furnish(self, at_walls: tuple, free: tuple, small: tuple):
    """A rug, furniture along the walls, free-standing furniture, small objects on tops and on the floor."""
    rng, pick = self.rng, lambda constructors: constructors[rng.integers(len(constructors))]
    if rng.random() < 0.4:
      half = (*np.minimum(rng.uniform(0.6, 1.3, 2), self.size[:2] / 2 - 0.2), 0.005)
      look = (FIRST, int(rng.choice([render.PLAIN, render.STRIPES, render.CHECKER])), 0.25)
      x, y = self.size[:2] * 0.5 + rng.uniform(-0.5, 0.5, 2) * (self.size[:2] - 2 * np.array(half[:2]))
      self.put_new(Object("rug", half[0], half[1], [furniture.box(0, 0, 0, half, *look)]), (x, y, 0.0), 0.0)
    area = self.size[0] * self.size[1]
    self.place(at_walls[0](rng), self._at_wall)
    for _ in range(int(1 + area / 10)):
      self.place(pick(at_walls)(rng), self._at_wall)
    for _ in range(int(1 + area / 12)):
      self.place(pick(free)(rng), self._anywhere)
    for x, y, thing in self.tops:
      if rng.random() < 0.7:
        self.put_new(pick(small)(rng), (x + rng.uniform(-0.15, 0.15), y + rng.uniform(-0.08, 0.08), thing.top), 0.3)
    for _ in range(rng.integers(1, 3)):
      self.place(pick((furniture.carton, furniture.ball))(rng), self._anywhere)

  def _at_wall(self, thing: Object) -> tuple[float, float, float]:
    """A random position with the back against a wall."""
    wall = int(self.rng.integers(4))
    room = max(self.size[wall % 2] / 2 - thing.half_width, 0)
    return *self.wall_place(wall, self.rng.uniform(-room, room), thing.half_depth), wall * np.pi / 2

  def _anywhere(self, thing: Object) -> tuple[float, float, float]:
    """A random position and direction."""
    return *(self.size[:2] * self.rng.uniform(0, 1, 2)), self.rng.uniform(0, 2 * np.pi)

  def _in_view(self, thing: Object) -> tuple[float, float, float]:
    """A random position in front of the camera, 1.2 to 4.5 m away."""
    forward = np.arctan2(self.camera.axes[2, 1], self.camera.axes[2, 0]) + self.rng.uniform(-0.45, 0.45)
    distance = self.rng.uniform(1.2, 4.5)
    spot = self.camera.origin[:2] + distance * np.array([np.cos(forward), np.sin(forward)])
    return *spot, self.rng.uniform(0, 2 * np.pi)

  def stand_figure(self) -> np.ndarray | None:
    """Adds a figure in front of the camera; returns its joints in the room, or None if there is no space."""
    rng, space = self.rng, Object("person", 0.3, 0.3, [])
    for _ in range(12):
      x, y, yaw = self._in_view(space)
      if self.free(x, y, 0.3, 0.3):
        break
    else:
      return None
    self.occupied.append((x, y, 0.15, 0.15))
    cos, sin = np.cos(yaw), np.sin(yaw)
    joints = figure.pose(rng) @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + np.array([x, y, 0])
    skin = np.array(SKINS[rng.integers(len(SKINS))])
    colors = (skin, self.color()[1], self.color()[1] * 0.8, self.wood() * 0.5)
    instance = self.new_instance("standing", "person")
    for start, end, radius, material in figure.bodies(joints):
      center, half, frame = figure.stretch(start, end, radius)
      solid = Solid(render.ELLIPSOID, tuple(center), tuple(half))
      self.add(solid, frame, center, np.stack([colors[material]] * 2), "person", instance)
    return joints.astype(np.float32)

  def light(self) -> render.Light:
    """A random lamp below the ceiling."""
    rng = self.rng
    position = self.size * [*rng.uniform(0.25, 0.75, 2), 0.93]
    tint = np.clip(1 + rng.normal(0, 0.02, 3), 0.9, 1.1) * rng.uniform(0.94, 1.06)
    footprints = np.array(self.occupied[1:], np.float32).reshape(-1, 4)  # the first is the camera's
    position, tint, room = (array.astype(np.float32) for array in (position, tint, self.size))
    return render.Light(position, float(rng.uniform(0.42, 0.55)), tint, HAZE, room, footprints)
