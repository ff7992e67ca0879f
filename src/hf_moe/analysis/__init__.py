"""Routing statistics, active parameters and pictures of a model's routing."""
