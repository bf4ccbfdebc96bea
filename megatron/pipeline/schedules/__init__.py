"""Pipeline schedules as data: generate, check, time, draw and lower them. Pure."""
