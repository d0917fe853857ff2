"""Foreign weights -> {our name: array}, and back."""
