"""A report as a page for a browser."""

from attnfx.report.html.page import page, write

__all__ = ["page", "write"]
