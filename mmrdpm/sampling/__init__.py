"""Sampling: text token by token, images step by step, from the same weights."""
