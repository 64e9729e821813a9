"""The storm: many processes do everything at once to two regions, and check all the time."""
