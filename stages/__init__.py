"""Models as pure stage functions: each file a config, an init, pure functions and a builder."""
