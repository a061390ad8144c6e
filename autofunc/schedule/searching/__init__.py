"""Schedules that are searched for, and what none can beat."""
