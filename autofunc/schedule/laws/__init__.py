"""What every schedule must hold to: each action once, in an order that can run, with sends and receives that meet."""
