"""What is known about training before it, and what is learned from it: plans and comparisons."""
