"""Running whole notebooks: the papermill engine, and `interp-kernel run`."""
