"""Attention over packed rows under one visibility rule."""
