"""The command lines `ploopd` and `ploopctl`: one module per noun."""
