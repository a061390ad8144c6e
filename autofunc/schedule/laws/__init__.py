"""The laws of schedules: each action once, in an order that can run, with matched sends and receives."""
