"""Which model runs next, and for how long: pure Python over names, counts and times."""
