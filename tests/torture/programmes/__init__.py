"""The programmes of `make torture`: one module each.

A module has

    name: str      what `--programme` calls it
    goal: int      episodes that RELIABILITY.md asks for
    what: str      one line for RELIABILITY.md's table
    def missing() -> str | None           what this machine lacks for it
    def run(seed: int, directory: Path) -> Result

`run` plays one batch of episodes, a minute's worth at most, that `seed` decides; `directory` is
empty and is removed afterwards.  A defect is an exception or a `Result` with errors or mismatches.
"""
