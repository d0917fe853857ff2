"""The training loop: after each step, the events that are due, see events.py."""

from ml_collections import ConfigDict

from vpd_jax.monitoring import progress
from vpd_jax.monitoring.writers import log
from vpd_jax.training.events import Event, TrainingEvents
from vpd_jax.training.session import TrainingSession


def run(config: ConfigDict, workdir: str, *, accept_changes: bool = False) -> dict[str, float]:
  """--mode=train: trains from the last checkpoint of the workdir, or from the initial weights, to `num_steps`.

  Args:
    config: of the run.
    workdir: a local folder or a bucket.
    accept_changes: resume even if the config differs from that of the checkpoint.

  Returns:
    The last scores; empty if no step was left.

  Raises:
    ValueError: in one line, for anything that cannot be assembled, found or resumed; another run uses the workdir.
    FloatingPointError: the loss is not finite; names the step.
  """
  with TrainingSession(config, workdir, accept_changes=accept_changes) as session:
    events = TrainingEvents(config, session.guard)
    if events.evaluates(session.step) and not session.has_scores():
      log(f"step {session.step} was saved without scores: evaluating it")
      session.evaluate()
    if session.guard.requested:
      log(f"stopped by {session.guard.cause} at step {session.step}")
      return session.scores
    if session.step >= config.num_steps:
      log(f"nothing to do: step {session.step} of {config.num_steps} is reached")
      return session.scores
    session.prepare()
    with progress.phase("train", config.num_steps, "steps", session.finished_steps):
      while True:
        session.train_step()
        for event in events.after(session.step):
          match event:
            case Event.LOG:
              session.write_logs()
            case Event.SAVE:
              session.save()
            case Event.SAVE_AND_WAIT:
              session.save(wait=True)
            case Event.EVALUATE:
              session.evaluate()
            case Event.STOP:
              session.report_stop()
              return session.scores
