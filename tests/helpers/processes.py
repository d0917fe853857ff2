"""What runs of several processes share."""

import socket

from tests.helpers import one_convolution

EIGHT = {"data.batch_size": 8, "eval.batch_size": 8, "eval.test_time": ()}


def config(steps):
  lengths = {"num_steps": steps, "eval_every": steps, "save_every": steps, "optim.schedule.num_steps": 1000}
  return one_convolution.rooms(**EIGHT, **lengths)


def free_port():
  with socket.socket() as held:
    held.bind(("127.0.0.1", 0))
    return held.getsockname()[1]
