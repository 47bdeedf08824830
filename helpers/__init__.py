"""What the lessons need and do not teach. Importing this package quiets known noise of the libraries, nothing else."""

from helpers import quiet

quiet.install()
