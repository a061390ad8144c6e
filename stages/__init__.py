"""Models as pure stage functions: each file has a config, an init, pure functions and a builder."""
