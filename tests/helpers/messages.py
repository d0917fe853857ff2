"""What a message to users must be."""

import pytest


def check_message(part, function):
  """Calls and returns the message, which must be one line that holds `part`."""
  with pytest.raises(ValueError) as caught:
    function()
  message = str(caught.value)
  assert part in message
  assert "\n" not in message
  return message


def check_sentences(error):
  """One line, with its end."""
  assert "\n" not in str(error) and str(error).endswith((".", ")")), error
