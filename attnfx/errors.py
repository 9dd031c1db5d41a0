"""The exceptions that attnfx raises."""


class AttnfxError(Exception):
    """Base of every exception that attnfx raises on purpose."""


class OptionError(AttnfxError, ValueError):
    """An option of the backend, or the environment variable that sets its default, is unknown or has a bad value."""


class RefusalError(AttnfxError):
    """With `strict`, a site was refused: the message says what, where in the user's code, and what to do."""


class BudgetError(AttnfxError):
    """A memory budget cannot be met; the message names the smallest peak that can be had, and what is in it."""
