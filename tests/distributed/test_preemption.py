"""What signals do to a run; the stop of several processes is tested in tests/runs."""

import os
import signal

import jax
import pytest

from vpd_jax.distributed.preemption import PreemptionGuard


def test_ctrl_c_is_given_to_all_processes_as_sigterm_and_twice_ends_this_one(monkeypatch, capsys):
  sent = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(os, "kill", lambda *signal_to: sent.append(signal_to))
  before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  with PreemptionGuard() as guard:
    assert signal.getsignal(signal.SIGTERM) is before[1], "JAX's own"
    signal.raise_signal(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGTERM)] and not guard.requested, "before the other processes know"
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert len(sent) == 1 and [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
  assert capsys.readouterr().err == "Ctrl-C: finishing and saving this step; press again to stop immediately\n"
