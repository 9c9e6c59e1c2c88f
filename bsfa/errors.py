"""The one exception for input a caller can put right."""


class InputError(ValueError):
    """Bad input, found before any work started; the message names the value and the way out."""
