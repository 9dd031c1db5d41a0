"""Keep the old home of `show` for the scripts that `verify` wrote before."""

from attnfx.verify.repro import show

__all__ = ["show"]
