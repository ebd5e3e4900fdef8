"""The network, the weights it starts from, what its frozen part computes once, and its optimizer."""
