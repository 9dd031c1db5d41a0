"""Define the exceptions that attnfx raises."""


class AttnfxError(Exception):
    """The base class of every exception that attnfx raises on purpose.

    If the backend raises one, `torch.compile` raises `torch._dynamo.exc.BackendCompilerFailed` with it as the attribute
    `inner_exception`.
    """


class OptionError(AttnfxError, ValueError):
    """An unknown option or a bad value, in the backend's options or in an environment variable."""


class RefusalError(AttnfxError):
    """A refused site or a graph that cannot be traced, in the backend with `strict`.

    The message gives the reason, a remedy and, for a site, the line in the user's code.
    """


class BudgetError(AttnfxError):
    """A memory budget that no plan meets. The message gives the smallest possible peak and its parts."""
