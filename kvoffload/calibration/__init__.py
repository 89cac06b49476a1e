"""Calibration: what is learned from a frozen model and text of its own, before anything is generated."""
