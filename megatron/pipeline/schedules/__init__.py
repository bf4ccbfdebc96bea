"""Pipeline schedules as data: made, checked, timed, drawn and lowered. Pure."""
