"""Reasoning and tool calls out of generated text: pure incremental parsers, one small file per family.

Every parser takes text in pieces and returns parts. How the text was cut into pieces changes how parts are cut,
and nothing else: parts of one kind that follow one another, joined, are the same for every cutting.
"""
