"""Errors that are meant for users: one line that says what came, what is needed and what to do."""


class UserError(ValueError):
  """What a user gave cannot be used. Commands show its text alone; any other ValueError comes with its traceback."""


class NotFiniteError(UserError, FloatingPointError):
  """Training cannot go on, as its loss is not finite."""
