"""What a tracker (Weights & Biases, TensorBoard, any of Accelerate's) is told of a run."""
