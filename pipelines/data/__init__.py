"""From folders of photos to normalised batches: the index, the plan, and the loader that executes it."""
