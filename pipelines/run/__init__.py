"""The run folder `runs/<name>/`: checkpoints, metrics, pictures, and whether a run may go on."""
