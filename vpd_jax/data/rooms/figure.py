"""A human figure: 17 COCO keypoints in a random standing pose, and the ellipsoids to render it."""

import numpy as np

# Source: COCO keypoint annotations, `categories[0]["keypoints"]`.
KEYPOINTS = (
  *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
  *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
  "right_ankle",
)
SKIN, SHIRT, TROUSERS, HAIR = range(4)


def pose(rng: np.random.Generator) -> np.ndarray:
  """Joints float32 [17, 3] of a standing or walking figure, meters, feet at z = 0, facing +y, its left at -x.

  Limb lengths are those of an adult of 1.7 m, scaled by a random factor between 0.88 and 1.1.
  """
  joints = {}
  lean = rng.normal(0, 0.06, 2)
  neck = np.array([0.52 * lean[0], 0.52 * lean[1], 0.52])  # above the middle of the hips
  turn = rng.normal(0, 0.25)
  for name, sign in (("left", -1), ("right", 1)):
    across = sign * np.array([np.cos(turn), np.sin(turn), 0])
    joints[f"{name}_hip"] = np.array([sign * 0.1, 0, 0])
    swing, bend = rng.normal(0, 0.3), abs(rng.normal(0, 0.35))
    joints[f"{name}_knee"] = joints[f"{name}_hip"] + 0.43 * direction(swing, sign * 0.04)
    joints[f"{name}_ankle"] = joints[f"{name}_knee"] + 0.42 * direction(swing - bend, sign * 0.02)
    joints[f"{name}_shoulder"] = neck + 0.18 * across - [0, 0, 0.04]
    swing, lift, bend = rng.normal(0.1, 0.7), rng.gamma(1.5, 0.3), abs(rng.normal(0.3, 0.7))
    joints[f"{name}_elbow"] = joints[f"{name}_shoulder"] + 0.29 * direction(swing, sign * min(lift, 2.6))
    joints[f"{name}_wrist"] = joints[f"{name}_elbow"] + 0.26 * direction(swing + bend, sign * min(lift, 2.6) * 0.8)
  head = neck + np.array([0, 0.02, 0.19])
  facing = turn + rng.normal(0, 0.3)
  front, side = np.array([-np.sin(facing), np.cos(facing), 0]), np.array([np.cos(facing), np.sin(facing), 0])
  joints["nose"] = head + 0.11 * front - [0, 0, 0.02]
  for name, sign in (("left", -1), ("right", 1)):
    joints[f"{name}_eye"] = head + 0.09 * front + sign * 0.035 * side + [0, 0, 0.025]
    joints[f"{name}_ear"] = head + sign * 0.08 * side
  points = np.array([joints[name] for name in KEYPOINTS])
  points[:, 2] += 0.07 - points[-2:, 2].min()
  return (points * rng.uniform(0.88, 1.1)).astype(np.float32)


def direction(forward: float, aside: float) -> np.ndarray:
  """The unit vector -z, rotated towards +y by `forward` and towards +x by `aside`, in radians."""
  return np.array([np.sin(aside), np.sin(forward) * np.cos(aside), -np.cos(forward) * np.cos(aside)])


def bodies(joints: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float, int]]:
  """Limbs of a figure: (start, end, radius, material) each, start and end [3] in meters."""
  position = dict(zip(KEYPOINTS, joints, strict=True))
  shoulders, hips = (
    (position["left_shoulder"] + position["right_shoulder"]) / 2,
    (position["left_hip"] + position["right_hip"]) / 2,
  )
  head = (position["left_ear"] + position["right_ear"]) / 2
  up = np.array([0, 0, 0.11], np.float32)
  limbs = [
    (head - up, head + up, 0.095, SKIN),
    (head + 0.1 * up, head + 1.2 * up, 0.1, HAIR),
    (shoulders - 0.5 * up, head, 0.055, SKIN),
    (position["left_shoulder"], position["right_shoulder"], 0.08, SHIRT),
    (shoulders, hips, 0.16, SHIRT),
    (position["left_hip"], position["right_hip"], 0.12, TROUSERS),
  ]
  for side in ("left", "right"):
    joint = {name: position[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")}
    limbs += [
      (joint["shoulder"], joint["elbow"], 0.055, SHIRT),
      (joint["elbow"], joint["wrist"], 0.045, SKIN),
      (joint["hip"], joint["knee"], 0.085, TROUSERS),
      (joint["knee"], joint["ankle"], 0.065, TROUSERS),
    ]
  return limbs


def stretch(start: np.ndarray, end: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Center [3], half axes [3] and frame [3, 3] of the ellipsoid around a limb."""
  axis = end - start
  length = float(np.linalg.norm(axis))
  axis = axis / length
  other = np.cross(axis, [1.0, 0, 0] if abs(axis[0]) < 0.7 else [0, 1.0, 0])
  other /= np.linalg.norm(other)
  frame = np.stack([other, np.cross(axis, other), axis])
  return (start + end) / 2, np.array([radius, radius, length / 2 + 0.6 * radius]), frame
