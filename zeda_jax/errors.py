"""The one exception that users are meant to read."""


class ZedaError(ValueError):
  """A problem the user can mend: what was found, what was expected, what to do.

  The message is one sentence; the command line prints it without a traceback.
  """
