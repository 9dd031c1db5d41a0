"""Re-export `show` for scripts that older versions of `verify` wrote."""

from attnfx.verify.repro import show

__all__ = ["show"]
