"""The model: the only code that travels in a Hub folder."""
