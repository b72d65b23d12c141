"""Draws the numbers that analysis/ collects: figures, tables and one page of HTML."""
