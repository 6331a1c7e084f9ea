"""Front ends: how initiators reach the logical units.  They do not know each other."""
