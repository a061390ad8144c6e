"""Schedules, costs and memory as files."""
