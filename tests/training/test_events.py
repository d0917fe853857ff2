"""The events of each step."""

import types

import pytest

from vpd_jax.training.events import Event, TrainingEvents

CONFIG = types.SimpleNamespace(num_steps=6, log_every=2, save_every=3, eval_every=4)
LOG, SAVE, SAVE_AND_WAIT, EVALUATE, STOP = Event


class Guard:
  """In place of PreemptionGuard: a stop is requested before the events of `at`, or during its evaluation."""

  def __init__(self, at=0, during=None):
    self.at, self.during, self.requested, self.calls = at, during, False, 0

  def should_stop(self):
    self.calls += 1
    self.requested = self.requested or self.calls == self.at
    return self.requested


def events(guard):
  """By step, to the end of the run."""
  after, found = TrainingEvents(CONFIG, guard).after, {}
  for step in range(1, CONFIG.num_steps + 1):
    found[step] = []
    for event in after(step):
      found[step].append(event)
      guard.requested = guard.requested or (event is EVALUATE and step == guard.during)
    if STOP in found[step]:
      return found
  return found


UNDISTURBED = {1: [], 2: [LOG], 3: [SAVE], 4: [LOG, SAVE, EVALUATE], 5: []}


@pytest.mark.parametrize(
  "guard, last",
  [
    (Guard(), {6: [LOG, SAVE_AND_WAIT, EVALUATE, STOP]}),
    (Guard(at=5), {5: [LOG, SAVE_AND_WAIT, STOP]}),
    (Guard(at=4), {4: [LOG, SAVE_AND_WAIT, STOP]}),
    (Guard(during=4), {4: [LOG, SAVE, EVALUATE, STOP]}),
  ],
  ids=["undisturbed", "stopped", "stopped where an evaluation is due", "stopped in an evaluation"],
)
def test_a_step_is_logged_saved_and_evaluated_in_this_order_and_the_last_one_in_any_case(guard, last):
  (end,) = last
  assert events(guard) == {step: found for step, found in UNDISTURBED.items() if step < end} | last


def test_a_stop_between_two_steps_waits_for_the_next_step():
  """A step that is not saved is never the last one."""
  guard = Guard()
  after = TrainingEvents(CONFIG, guard).after
  assert list(after(1)) == []
  guard.requested = True
  assert list(after(2)) == [LOG, SAVE_AND_WAIT, STOP]
