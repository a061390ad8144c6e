"""Timelines to look at: as text, SVG, a page and a trace, all from the same blocks."""
