"""What a training run will take, predicted before it starts."""
