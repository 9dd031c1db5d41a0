"""Write a report as an HTML page."""

from attnfx.report.html.page import page, write

__all__ = ["page", "write"]
