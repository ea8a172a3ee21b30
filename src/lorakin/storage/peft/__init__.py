"""How PEFT writes an adapter: its config, its names and shapes of tensors, both ways."""
