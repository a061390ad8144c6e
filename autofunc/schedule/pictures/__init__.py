"""Pictures of timelines: text, SVG, PNG, a page and a trace, all from the same blocks."""
