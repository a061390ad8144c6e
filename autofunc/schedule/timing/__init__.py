"""When each action runs: costs, simulated and measured timelines, and what they say."""
