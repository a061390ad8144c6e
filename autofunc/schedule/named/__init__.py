"""Schedules by name: one construction a file, how their rows are written, and the user's own beside them."""
