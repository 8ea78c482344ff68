"""Cameras and streams: whose frames come when they come, and without an end."""
