"""The schedule of events after the steps of a run."""

import enum
from collections.abc import Iterator

from ml_collections import ConfigDict

from vpd_jax.distributed.preemption import PreemptionGuard


class Event(enum.Enum):
  """Something the training loop does after a step."""

  LOG = "write the logs of the step"
  SAVE = "save a checkpoint in the background"
  SAVE_AND_WAIT = "save a checkpoint, and wait until it is on disk"
  EVALUATE = "evaluate the parameters, and add the scores to the checkpoint"
  STOP = "leave the loop"


class TrainingEvents:
  """The events of each step, from `log_every`, `save_every`, `eval_every` and `num_steps` of the config.

  The last step, which is `num_steps` or the one after which a stop is requested, is always logged and saved. A step is
  saved before it is evaluated, so that it is not lost if the evaluation fails.

  Args:
    config: of the run.
    guard: queried once per step.
  """

  def __init__(self, config: ConfigDict, guard: PreemptionGuard):
    self._config, self._guard = config, guard

  def after(self, step: int) -> Iterator[Event]:
    """The events after the given step, in order.

    Handle each event before taking the next one: a request to stop that arrives during an evaluation ends the run
    after that step.
    """
    due = lambda every: step % every == 0
    last = self._guard.should_stop() or step == self._config.num_steps
    if last or due(self._config.log_every):
      yield Event.LOG
    if last:
      yield Event.SAVE_AND_WAIT
    elif due(self._config.eval_every) or due(self._config.save_every):
      yield Event.SAVE
    if self.evaluates(step) and not self._guard.requested:
      yield Event.EVALUATE
      last = last or self._guard.requested
    if last:
      yield Event.STOP

  def evaluates(self, step: int) -> bool:
    """Whether a checkpoint of the given step has scores, unless the run was stopped before."""
    return 0 < step <= self._config.num_steps and (
      step == self._config.num_steps or step % self._config.eval_every == 0
    )
