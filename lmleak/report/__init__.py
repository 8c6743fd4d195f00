"""One self-contained report of a run: what leaked, how much noise is enough, and where."""
