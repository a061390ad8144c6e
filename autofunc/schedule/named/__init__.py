"""Schedules by name: one construction per file, helpers that write their rows, and the user's own schedules."""
