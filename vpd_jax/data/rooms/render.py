"""Ray caster for the procedural rooms: boxes, cylinders and ellipsoids, in numpy and float32.

A part is a unit solid under an affine map, so intersections are computed in its local coordinates. Parts are rendered
one by one into a depth buffer, each only within its bounding rectangle of pixels; colors are computed afterwards, once
per pixel. World coordinates are meters, z upwards. Camera axes are right, down, forward.
"""

from typing import NamedTuple

import numpy as np

BOX, CYLINDER, ELLIPSOID = range(3)
PLAIN, CHECKER, STRIPES, PLANKS, TILES, NOISE, PANELS, SKY, PAINTING, BOOKS = range(10)
FOCAL = 0.81  # focal length over image width: that of NYU's camera (519 of 640), 63 degrees
HAZE_COLOR = np.array([0.1, 0.15, 0.25], np.float32)
NEAR = 0.05  # meters, the near plane
CORNERS = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(8, 3).astype(np.float32)


class Parts(NamedTuple):
  """N solids. `frames @ (point - centers) / halves` are the local coordinates, in which the solid is the unit solid.

  Attributes:
    shapes: [N], BOX, CYLINDER (axis z) or ELLIPSOID.
    centers: float32 [N, 3], meters.
    halves: float32 [N, 3], half of the extent along each axis of the frame, meters.
    frames: float32 [N, 3, 3], rows are the solid's axes.
    colors: float32 [N, 2, 3], reflectances in [0, 1]; the texture mixes the two.
    textures: [N], PLAIN, CHECKER, ...
    pitches: float32 [N], meters, size of the texture's cells.
    labels: uint8 [N], class.
    instances: [N], number of the object, 0 for the room itself.
  """

  shapes: np.ndarray
  centers: np.ndarray
  halves: np.ndarray
  frames: np.ndarray
  colors: np.ndarray
  textures: np.ndarray
  pitches: np.ndarray
  labels: np.ndarray
  instances: np.ndarray


class Camera(NamedTuple):
  """Pinhole camera: `origin` float32 [3] and `axes` float32 [3, 3], rows right, down, forward."""

  origin: np.ndarray
  axes: np.ndarray


class Light(NamedTuple):
  """A lamp, with haze and shadows.

  Attributes:
    position: float32 [3], meters.
    ambient: fraction of ambient light, in [0, 1].
    tint: float32 [3], color and intensity.
    haze: 1/meter, attenuation per meter on the way to the camera.
    room: float32 [3], size of the room, whose corners are darker.
    footprints: float32 [F, 4], (x, y, half width, half depth) of objects on the floor, for contact shadows.
  """

  position: np.ndarray
  ambient: float
  tint: np.ndarray
  haze: float
  room: np.ndarray
  footprints: np.ndarray


def look(origin: np.ndarray, yaw: float, pitch: float, roll: float) -> Camera:
  """Camera at `origin` with `yaw` (from x towards y), `pitch` (upwards) and `roll` in radians."""
  forward = np.array([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)])
  right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
  down = np.cross(forward, right)
  axes = [np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right, forward]
  return Camera(np.asarray(origin, np.float32), np.asarray(axes, np.float32))


def turned(camera: Camera, angle: float) -> Camera:
  """The camera after a turn around the vertical axis, `angle` radians from x towards y."""
  cosine, sine = np.cos(angle), np.sin(angle)
  rotation = np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])
  return camera._replace(axes=np.asarray(camera.axes @ rotation, np.float32))


def project(points: np.ndarray, camera: Camera, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Pixel coordinates (x, y) [..., 2] of world points [..., 3], and their planar depth [...] in meters."""
  local = (points - camera.origin) @ camera.axes.T
  depth = local[..., 2]
  scale = FOCAL * size[1] / np.maximum(depth, NEAR)
  return local[..., :2] * scale[..., None] + np.array([size[1], size[0]], np.float32) / 2, depth


def cast_rays(camera: Camera, size: tuple[int, int]) -> np.ndarray:
  """Directions float32 [3, H, W] through the pixel centers, of length 1 along the optical axis.

  Therefore the parameter of a ray is the planar depth.
  """
  height, width = size
  right = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / np.float32(FOCAL * width)
  down = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / np.float32(FOCAL * width)
  x, y, z = camera.axes[:, :, None, None]
  return x * right + y * down[:, None] + z


def draw(parts: Parts, camera: Camera, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Depth float32 [H, W], inf for the background, and the index of the visible part, [H, W]."""
  size = rays.shape[1:]
  depth, seen = np.full(size, np.inf, np.float32), np.zeros(size, np.int32)
  maps = parts.frames / parts.halves[:, :, None]
  origins = np.einsum("nij,nj->ni", maps, camera.origin - parts.centers)
  for index, (top, bottom, left, right) in enumerate(cover(parts, camera, size)):
    if bottom <= top or right <= left:
      continue
    window = np.s_[top:bottom, left:right]
    directions = maps[index] @ rays[:, top:bottom, left:right].reshape(3, -1)
    hit = intersect(int(parts.shapes[index]), origins[index], directions).reshape(bottom - top, right - left)
    nearer = hit < depth[window]
    np.copyto(depth[window], hit, where=nearer)
    np.copyto(seen[window], index, where=nearer)
  return depth, seen


def cover(parts: Parts, camera: Camera, size: tuple[int, int]) -> list[list[int]]:
  """Bounding rectangle (top, bottom, left, right) of each part in pixels; the full image if it reaches the camera."""
  corners = np.einsum("nci,nij->ncj", CORNERS * parts.halves[:, None], parts.frames) + parts.centers[:, None]
  pixels, depth = project(corners, camera, size)
  low, high = np.floor(pixels.min(1)), np.ceil(pixels.max(1))
  reaches = depth.min(1) < NEAR
  box = np.stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]], 1)
  box[reaches] = [0, size[0], 0, size[1]]
  box[depth.max(1) < NEAR] = 0
  return np.clip(box, 0, [size[0], size[0], size[1], size[1]]).astype(int).tolist()


def intersect(shape: int, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
  """First hit of the unit solid by rays from `origin` [3] along `directions` [3, P]; inf for a miss.

  Every solid is a convex intersection of slabs and quadrics: a ray is inside from the last entry to the first exit.
  """
  with np.errstate(divide="ignore", invalid="ignore"):
    if shape == BOX:
      enter, leave = slabs(origin, directions)
    elif shape == ELLIPSOID:
      enter, leave = quadric(origin, directions)
    else:
      enter, leave = quadric(origin[:2], directions[:2])
      bottom, top = slabs(origin[2:], directions[2:])
      enter, leave = np.maximum(enter, bottom), np.minimum(leave, top)
    return np.where((enter <= leave) & (enter > NEAR), enter, np.float32(np.inf))


def slabs(origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Entry and exit of |coordinate| <= 1 in all given coordinates."""
  inverse = 1 / (directions + np.float32(1e-12))  # avoids division by 0 for rays parallel to a face
  middle, reach = -origin[:, None] * inverse, np.abs(inverse)
  return (middle - reach).max(0), (middle + reach).min(0)


def quadric(origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Entry and exit of |coordinates| <= 1 in the Euclidean norm; NaN for a miss."""
  a, b = np.einsum("ip,ip->p", directions, directions), origin @ directions
  root = np.sqrt(b * b - a * (origin @ origin - 1))
  return (-b - root) / a, (-b + root) / a


def shade(parts: Parts, camera: Camera, light: Light, rays: np.ndarray, depth: np.ndarray, seen: np.ndarray):
  """Color of every pixel, float32 [H, W, 3], unbounded above: texture times Lambertian shading, with haze."""
  directions, part, reach = rays.reshape(3, -1).T, seen.ravel(), depth.ravel()[:, None]
  points = camera.origin + reach * directions  # [P, 3]
  frames, halves = parts.frames[part], parts.halves[part]
  local = np.einsum("pij,pj->pi", frames, points - parts.centers[part])
  normals, cells = surface(parts.shapes[part], local / halves, local, halves)
  normals = np.einsum("pi,pij->pj", normals, frames)
  slant = np.maximum(np.abs(np.einsum("pi,pi->p", normals, directions)), 0.05)
  footprint = reach[:, 0] / (FOCAL * depth.shape[1] * slant)
  color = reflectance(parts, part, cells, footprint)
  shine = np.where(parts.textures[part] == SKY, np.float32(1), irradiance(normals, points, light))
  fog = np.exp(-np.float32(light.haze) * reach)
  return (color * shine[:, None] * light.tint * fog + HAZE_COLOR * (1 - fog)).reshape(*depth.shape, 3)


def surface(shapes: np.ndarray, unit: np.ndarray, local: np.ndarray, halves: np.ndarray):
  """Normals [P, 3] in the frame of the part, and texture coordinates [P, 4]: two in meters, two face-relative."""
  size = np.abs(unit)
  face = size.argmax(1)
  pick = np.arange(len(face))
  normals = np.zeros_like(unit)
  normals[pick, face] = np.sign(unit[pick, face])
  round_ = shapes == ELLIPSOID
  normals[round_] = unit[round_] / halves[round_]
  side = (shapes == CYLINDER) & (size[:, 2] < 0.999)
  normals[side] = unit[side] / halves[side] * np.array([1, 1, 0], np.float32)
  normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-6
  u, v = np.where(face == 0, 1, 0), np.where(face == 2, 1, 2)
  cells = np.stack([local[pick, u], local[pick, v], unit[pick, u], unit[pick, v]], 1)
  return normals, cells


def irradiance(normals: np.ndarray, points: np.ndarray, light: Light) -> np.ndarray:
  """Irradiance at each point [P]: ambient light with occlusion, and the Lambertian light of the lamp."""
  toward = light.position - points
  distance = np.sqrt(np.einsum("pi,pi->p", toward, toward)) + 1e-3
  cosine = np.maximum(np.einsum("pi,pi->p", normals, toward) / distance, 0)
  lamp = (1 - light.ambient) * 2.2 * cosine / (1 + (distance / 3.5) ** 2)
  x, y, z = np.maximum(np.minimum(points, light.room - points), 0).T
  gap = np.maximum(np.minimum(x, y), np.minimum(np.maximum(x, y), z))  # to the second nearest plane of the room
  ambient = light.ambient * (1 - 0.45 * np.exp(-gap / 0.25)) * (1 + 0.15 * normals[:, 2])
  shine = ambient + lamp
  floor = np.flatnonzero(points[:, 2] < 0.02)
  shine[floor] *= contact_shadow(points[floor, :2], light.footprints)
  return shine


def contact_shadow(points: np.ndarray, footprints: np.ndarray) -> np.ndarray:
  """Factor [P] that darkens the floor at points [P, 2] below and near objects."""
  if not len(footprints):
    return np.ones(len(points), np.float32)
  beyond = [np.maximum(np.abs(points[:, i, None] - footprints[:, i]) - footprints[:, 2 + i], 0) for i in (0, 1)]
  return 1 - 0.45 * np.exp(-np.maximum(*beyond).min(1) / 0.12)


def reflectance(parts: Parts, part: np.ndarray, cells: np.ndarray, footprint: np.ndarray) -> np.ndarray:
  """Texture of every pixel, [P, 3]; a pattern finer than the pixel's footprint in meters fades to its mean."""
  first, second = parts.colors[part, 0], parts.colors[part, 1]
  textures, pitches = parts.textures[part], parts.pitches[part]
  mix, tone = np.zeros(len(part), np.float32), np.ones(len(part), np.float32)
  for texture in np.unique(textures):
    pixels = np.flatnonzero(textures == texture)
    mix[pixels], tone[pixels] = pattern(int(texture), cells[pixels], pitches[pixels], part[pixels])
  sharp = np.clip(1.6 - 2.4 * footprint / pitches, 0, 1)
  flat = np.isin(textures, (SKY, PANELS, PAINTING))
  mix = np.where(flat, mix, mix * sharp + 0.25 * (1 - sharp) * (textures != PLAIN))
  tone = 1 + (tone - 1) * np.where(flat, 1, sharp)
  return (first + (second - first) * mix[:, None]) * tone[:, None]


def pattern(texture: int, cells: np.ndarray, pitch: np.ndarray, part: np.ndarray):
  """Share of the second color and a factor of brightness, [P] each or a number."""
  u, v = cells[:, 0] / pitch, cells[:, 1] / pitch
  if texture == CHECKER:
    return (np.floor(u) + np.floor(v)) % 2, 1.0
  if texture == STRIPES:
    return np.floor(u) % 2, 1.0
  if texture == PLANKS:
    row = np.floor(v)
    along = u / 5 + row * 0.37
    groove = (v - row < 0.1) | (along - np.floor(along) < 0.02)
    return groove, 0.75 + 0.5 * scatter(np.floor(along), row, part)
  if texture == TILES:
    groove = (u - np.floor(u) < 0.09) | (v - np.floor(v) < 0.09)
    return groove, 0.9 + 0.2 * scatter(np.floor(u), np.floor(v), part)
  if texture == NOISE:
    return scatter(np.floor(8 * u), np.floor(8 * v), part), 0.9 + 0.2 * scatter(np.floor(u), np.floor(v), part)
  if texture == BOOKS:
    row = np.floor(v)
    board, book = v - row < 0.15, scatter(np.floor(u * 7), row, part)
    return np.where(board, 0, book), np.where(board, 1.0, 0.4 + 0.9 * ((book * 7) % 1))
  across, up = cells[:, 2], cells[:, 3]
  if texture == PANELS:
    groove = (np.abs(np.abs(across) - 0.86) < 0.06) | (np.abs(np.abs(up) - 0.9) < 0.05) | (np.abs(across) < 0.04)
    return groove, 1.0
  if texture == SKY:
    return 0.5 - 0.5 * up, 1.0
  if texture == PAINTING:
    return scatter(np.floor(2.5 * across + 9), np.floor(2.5 * up + 9), part), 1.0
  return 0.0, 1.0


def scatter(column: np.ndarray, row: np.ndarray, part: np.ndarray) -> np.ndarray:
  """Fixed pseudo-random numbers in [0, 1) of integer cells, float32 [P]."""
  mixed = column.astype(np.int64) * 73856093 ^ row.astype(np.int64) * 19349663 ^ part.astype(np.int64) * 83492791
  mixed ^= mixed >> 13
  return ((mixed * 1274126177 >> 16) & 255).astype(np.float32) / 256
