"""Prompt → expert weights."""
