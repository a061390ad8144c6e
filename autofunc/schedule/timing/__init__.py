"""When each action runs: costs, simulated and measured timelines, and why ranks idle."""
