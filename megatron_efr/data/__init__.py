"""Prompts: files and data sets, chat templates, the arithmetic task, a resumable stream."""
