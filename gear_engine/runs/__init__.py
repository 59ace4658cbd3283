"""Runs: folders of samples that are written once, resume exactly and never mix two settings.

Nothing here knows a model: a run is given a function that draws images for a list of image numbers.
"""
