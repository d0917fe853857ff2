#!/usr/bin/env bash
# jax2onnx writes a drawing of JAX with a fixed key as an operator that draws
# other numbers, and with its default opset ONNX Runtime does not load it.
#
# Versions: jax2onnx 0.17.1, jax 0.10.2, flax 0.12.8, onnx 1.23.2,
#           onnxruntime 1.32.0 (Python 3.11, Linux, CPU)
# Expected: jax.random.normal(jax.random.key(0), shape) is one fixed array, in
#           JAX on every device; its ONNX program gives that array, or the
#           conversion is refused as with other operations it does not know.
# Observed: the nodes are RandomNormal and RandomNormalLike. With the default
#           opset, 23, ONNX Runtime has no RandomNormal(22) and does not load
#           the file. With opset=21 it runs and gives other numbers; nothing
#           says so while the file is written.
# Output seen on 2026-11-30:
#   opset 23: RandomNormal, RandomNormalLike, Add: NotImplemented
#   opset 21: RandomNormal, RandomNormalLike, Add: largest difference 1.88
#   unchanged: fixed numbers of JAX are not those of the ONNX program
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 \
  onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 equinox==0.13.8 \
  dm-pix==0.4.5 einops==0.8.2
"$dir/venv/bin/pip" install --quiet --no-deps jax2onnx==0.17.1

cat > "$dir/convert.py" <<'END_PYTHON'
import sys

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnx
import onnxruntime

path, seen = sys.argv[1], {}
draw = lambda x: x + jax.random.normal(jax.random.key(0), x.shape)
for opset in (23, 21):
  shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  jax2onnx.to_onnx(
    draw, [shape], model_name="draw", opset=opset, return_mode="file", output_path=path
  )
  nodes = ", ".join(node.op_type for node in onnx.load(path).graph.node)
  zeros = np.zeros((2, 3), np.float32)
  try:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: zeros})
    seen[opset] = float(np.abs(found - draw(zeros)).max())
    result = f"largest difference {seen[opset]:.2f}"
  except Exception as error:
    seen[opset] = type(error).__name__
    result = seen[opset]
  print(f"opset {opset}: {nodes}: {result}")
if seen[23] == "NotImplemented" and isinstance(seen[21], float) and seen[21] > 0.1:
  print("unchanged: fixed numbers of JAX are not those of the ONNX program")
else:
  sys.exit("behavior changed")
END_PYTHON
JAX_PLATFORMS=cpu "$dir/venv/bin/python" "$dir/convert.py" "$dir/draw.onnx" 2> /dev/null
