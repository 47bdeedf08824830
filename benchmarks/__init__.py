"""Full-size measurements: the benchmark program, the checkpoints with random weights, and the recorded results."""

import helpers  # noqa: F401  # first: this quiets known noise of the libraries
