"""Measurements of vlmkernels against other libraries, and the demo."""
