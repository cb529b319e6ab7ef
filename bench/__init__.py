"""Measurements, side by side with the limits of the machine and with what others offer."""
