"""Metrics, question answering scores and their reports."""
