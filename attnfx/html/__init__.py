"""A report as a page for a browser."""

from attnfx.html.page import page

__all__ = ["page"]
