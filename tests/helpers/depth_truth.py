"""Made-up depth with holes, as the oracle measured it."""

from tests.helpers import fill


def truth_of(case, i, size, largest):
  """Meters, 0 where a hole is."""
  measured = fill.uniform(f"metrics/{case}/gt/{i}", size, 0, 0.0005, 1.1 * largest)
  return measured * (fill.uniform(f"metrics/{case}/valid/{i}", size, 0) > 0.3)
