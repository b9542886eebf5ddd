"""The parts of the built-in image builder."""
