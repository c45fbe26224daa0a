"""Whole models, written the way people write them: no fxport import, no base class."""
