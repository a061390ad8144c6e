"""Search for schedules, and bounds that none can beat."""
