"""Define the exceptions that attnfx raises."""


class AttnfxError(Exception):
    """The base class of every exception that attnfx raises on purpose."""


class OptionError(AttnfxError, ValueError):
    """An unknown option or a bad value, in the backend's options or in an environment variable."""


class RefusalError(AttnfxError):
    """A refused site, with `strict`. The message gives the reason, the line in the user's code, and a remedy."""


class BudgetError(AttnfxError):
    """A memory budget that no plan meets. The message gives the smallest possible peak and its parts."""
